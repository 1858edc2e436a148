-- A person accepts that a log goes on from the position that the store still has.
-- KEYS: meta, proj.  ARGV: base, sid, position
local META, PROJ = KEYS[1], KEYS[2]
local m = redis.call('HMGET', META, 'state', 'reg')
if m[1] == false then return {'NOSESSION'} end
local seen, position = string.match(m[2] or '', '^(%d+):(%d+)$')
if position ~= ARGV[3] then return {'STALE'} end
redis.call('HSET', META, 'acc', seen)
redis.call('HDEL', META, 'reg')
project(PROJ)
return {'OK'}
