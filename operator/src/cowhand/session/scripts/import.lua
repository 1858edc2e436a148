-- Put a staged log in the place of a session's, all at once: a fork, or a restored session.
-- KEYS: meta, log, dedupe, ready, own, proj, staged
-- ARGV: base, sid, length of staged, next ('' = there must be no session), expire_ms (0: stays), ready(0|1),
--       n, (dedupe id, seq)*n, k, (meta field, value)*k, (type, eid, payload)*
local META, LOG, DEDUPE, READY, OWN, PROJ = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local STAGED, length = KEYS[7], tonumber(ARGV[3])
local m = redis.call('HMGET', META, 'state', 'next', 'lease', 'rdy', 'epoch')
if m[1] == false then
  if ARGV[4] ~= '' then return {'CHANGED'} end
else
  if ARGV[4] == '' then return {'EXISTS'} end
  if m[2] ~= ARGV[4] then return {'CHANGED'} end
  if m[3] ~= '' then return {'HELD', m[3]} end
end
if redis.call('XLEN', STAGED) ~= length then return {'TORN'} end
local n = tonumber(ARGV[7])
local k = tonumber(ARGV[8 + 2 * n])
local fields, extra = 9 + 2 * n, 9 + 2 * n + 2 * k
redis.call('DEL', DEDUPE)
redis.call('RENAME', STAGED, LOG)
redis.call('PERSIST', LOG)
redis.call('PERSIST', META)
for i = 0, n - 1 do redis.call('HSET', DEDUPE, ARGV[8 + 2 * i], ARGV[9 + 2 * i]) end
redis.call('HSET', META, 'state', 'idle', 'lease', '', 'wseq', 0, 'wfirst', 0, 'rdy', m[4] or '0')
redis.call('HDEL', META, 'min', 'seg', 'reg', 'rel')
for i = 0, k - 1 do redis.call('HSET', META, ARGV[fields + 2 * i], ARGV[fields + 1 + 2 * i]) end
-- The lease of a later claim must be higher than any that was given out, in the copy or here.
local epoch = tonumber(redis.call('HGET', META, 'epoch') or '0')
redis.call('HSET', META, 'epoch', string.format('%d', math.max(epoch, tonumber(m[5] or '0'))))
local now, seq = now_ms(), length + 1
for i = extra, #ARGV, 3 do
  put(LOG, seq, ARGV[i], ARGV[i + 1], now, '', ARGV[i + 2])
  redis.call('HSET', DEDUPE, ARGV[i + 1], seq)
  seq = seq + 1
end
redis.call('HSET', META, 'next', seq)
redis.call('HSETNX', META, 'created', now)
redis.call('ZREM', OWN, SID)
if ARGV[6] == '1' and not (m[4] and m[4] ~= '0') then enqueue(META, READY) end
if tonumber(ARGV[5]) > 0 then
  for _, key in ipairs({META, LOG, DEDUPE}) do redis.call('PEXPIRE', key, tonumber(ARGV[5])) end
end
project(PROJ)
tail(seq - 1)
return {'OK', seq}
