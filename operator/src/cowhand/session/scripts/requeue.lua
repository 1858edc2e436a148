-- Put a leased session back on the ready stream if its holder is dead or stuck.
-- KEYS: meta, own, proj, ready, workers.  ARGV: base, sid
local META, OWN, PROJ, READY, WORKERS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local m = redis.call('HMGET', META, 'state', 'lease', 'mode', 'rdy')
if m[1] == false or ended(m[1]) or m[2] == '' then
  redis.call('ZREM', OWN, SID)
  return 0
end
if live(m[2], WORKERS, OWN, now_ms()) then return 0 end
if m[3] == 'suspended' then
  -- Nobody may claim it: take the lease away, so that resuming finds it.
  redis.call('HSET', META, 'lease', '', 'state', 'rescheduling', 'seen', 0)
  redis.call('ZREM', OWN, SID)
  project(PROJ)
  return 0
end
if m[4] ~= '0' then return 0 end
redis.call('HSET', META, 'state', 'rescheduling')
enqueue(META, READY)
project(PROJ)
return 1
