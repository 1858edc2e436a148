-- Give the lease back and nominate the session for another worker. `rel` makes a repeated call answer the same.
-- KEYS: meta, own, proj, ready.  ARGV: base, sid, lease
local META, OWN, PROJ, READY = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local m = redis.call('HMGET', META, 'state', 'lease', 'mode', 'rdy', 'rel')
if m[1] == false then return {'NOSESSION'} end
if m[5] == ARGV[3] then return {'OK'} end
if m[1] == 'closed' then return {'CLOSED'} end
if m[2] ~= ARGV[3] then return {'FENCED', m[2]} end
redis.call('HSET', META, 'lease', '', 'rel', ARGV[3], 'state', 'rescheduling', 'seen', 0)
redis.call('ZREM', OWN, SID)
if m[3] == 'running' and m[4] == '0' then enqueue(META, READY) end
project(PROJ)
return {'OK'}
