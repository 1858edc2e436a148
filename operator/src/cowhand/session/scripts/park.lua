-- Give the lease back, only if nothing new arrived. `rel` makes a repeated call answer the same.
-- KEYS: meta, own, proj, timers.  ARGV: base, sid, lease, expected_next, state, wake_at ms ('' = no timer)
local META, OWN, PROJ, TIMERS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local m = redis.call('HMGET', META, 'state', 'lease', 'next', 'mode', 'rel')
if m[1] == false then return {'NOSESSION'} end
if m[5] == ARGV[3] then return {'OK', tonumber(m[3])} end
if m[1] == 'closed' then return {'CLOSED'} end
if m[2] ~= ARGV[3] then return {'FENCED', m[2]} end
if m[3] ~= ARGV[4] then return {'NEW', tonumber(m[3])} end
-- A worker that parks because of the suspension may leave work: resuming must wake the session then.
local seen = m[4] == 'suspended' and '0' or m[3]
redis.call('HSET', META, 'lease', '', 'rel', ARGV[3], 'state', ARGV[5], 'seen', seen)
redis.call('ZREM', OWN, SID)
if ARGV[6] ~= '' then redis.call('ZADD', TIMERS, ARGV[6], SID) end
project(PROJ)
return {'OK', tonumber(m[3])}
