-- Somebody has seen more of this log than the store has: say so in the log, and let nobody claim it.
-- KEYS: meta, log, dedupe, proj.  ARGV: base, sid, eid, type, payload, limit, seen
local META, LOG, DEDUPE, PROJ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local m = redis.call('HMGET', META, 'state', 'next', 'lease', 'reg', 'acc')
if m[1] == false then return {'NOSESSION'} end
if ended(m[1]) then return {'CLOSED', m[1]} end
local seen, seq = tonumber(ARGV[7]), tonumber(m[2])
if m[4] or seq - 1 >= seen or tonumber(m[5] or '0') >= seen then return {'DUP', seq - 1} end
mark(m[3])
put(LOG, seq, ARGV[4], ARGV[3], now_ms(), '', ARGV[5])
redis.call('HSET', DEDUPE, ARGV[3], seq)
redis.call('HSET', META, 'next', seq + 1, 'mode', 'suspended', 'reg', seen .. ':' .. (seq - 1))
tail(seq)
nudge(m[3], seq)
project(PROJ)
return {'OK', seq}
