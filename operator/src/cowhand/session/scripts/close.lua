-- End the log with session.deleted and take the lease away; the keys expire. Idempotent.
-- KEYS: meta, log, dedupe, hands, own, proj, timers.  ARGV: base, sid, eid, type, payload, limit, retain_ms (0: delete)
local META, LOG, DEDUPE, HANDS, OWN, PROJ, TIMERS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local m = redis.call('HMGET', META, 'state', 'next', 'lease', 'tomb')
local state, lease, tomb = m[1], m[3], m[4] or ''
if state == false then return {'NOSESSION'} end
if #ARGV[5] > tonumber(ARGV[6]) then return {'TOOBIG', 0, #ARGV[5]} end
local retain = tonumber(ARGV[7])
local first = state ~= 'closed'
if first then
  local seq = tonumber(m[2])
  mark(lease)
  put(LOG, seq, ARGV[4], ARGV[3], now_ms(), '', ARGV[5])
  redis.call('HSET', DEDUPE, ARGV[3], seq)
  redis.call('HSET', META, 'next', seq + 1, 'state', 'closed', 'lease', '')
  redis.call('ZREM', OWN, SID)
  redis.call('ZREM', TIMERS, SID)
  tail(seq)
  nudge(lease, seq)
  project(PROJ)
end
for _, key in ipairs({META, LOG, DEDUPE, HANDS}) do
  if retain == 0 then redis.call('DEL', key) elseif first then redis.call('PEXPIRE', key, retain) end
end
return {'OK', tomb}
