-- Write a hand record into the session's hash, and nudge the session's worker.
-- The record begins with {"state":"..","owner_epoch":N, so that no JSON is decoded here.
-- KEYS: meta, hands.  ARGV: base, sid, field, record
local META, HANDS = KEYS[1], KEYS[2]
local m = redis.call('HMGET', META, 'state', 'next', 'lease')
if m[1] == false then return {'NOSESSION'} end
if not newer(redis.call('HGET', HANDS, ARGV[3]), ARGV[4]) then return {'STALE'} end
mark(m[3])
redis.call('HSET', HANDS, ARGV[3], ARGV[4])
local left = redis.call('PTTL', META)
if left > 0 then redis.call('PEXPIRE', HANDS, left) end
nudge(m[3], tonumber(m[2]) - 1)
return {'OK'}
