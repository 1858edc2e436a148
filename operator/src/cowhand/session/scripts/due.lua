-- Put sessions whose timer is up back on the ready stream, the earliest first, at most `limit`.
-- KEYS: timers, ready.  ARGV: base, '', limit
local TIMERS, READY = KEYS[1], KEYS[2]
local count = 0
for _, sid in ipairs(redis.call('ZRANGE', TIMERS, '-inf', now_ms(), 'BYSCORE', 'LIMIT', 0, tonumber(ARGV[3]))) do
  local meta = BASE .. 's:' .. sid .. ':m'
  local m = redis.call('HMGET', meta, 'state', 'lease', 'mode', 'rdy')
  redis.call('ZREM', TIMERS, sid)
  -- Whoever suspended it wakes it when it resumes; a holder has looked at the session since.
  if m[1] and not ended(m[1]) and m[2] == '' and m[3] == 'running' and m[4] == '0' then
    enqueue(meta, READY, sid)
    count = count + 1
  end
end
return count
