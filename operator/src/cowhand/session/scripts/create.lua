-- Make a session: meta, its first events, and an entry in the ready stream. Idempotent by session id.
-- KEYS: meta, log, dedupe, ready, proj
-- ARGV: base, sid, ready(0|1), mode, limit, n, (type, eid, payload)*n, (meta field, value)*
local META, LOG, DEDUPE, READY, PROJ = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
if redis.call('EXISTS', META) == 1 then return {'EXISTS'} end
local n = tonumber(ARGV[6])
for i = 0, n - 1 do
  if #ARGV[9 + i * 3] > tonumber(ARGV[5]) then return {'TOOBIG', i, #ARGV[9 + i * 3]} end
end
local size = 1024
for i = 0, n - 1 do size = size + #ARGV[9 + i * 3] + 192 end
local full = no_room(size, 0)
if full then return full end
local now = now_ms()
redis.call('DEL', LOG, DEDUPE)
for i = 0, n - 1 do
  put(LOG, i + 1, ARGV[7 + i * 3], ARGV[8 + i * 3], now, '', ARGV[9 + i * 3])
  redis.call('HSET', DEDUPE, ARGV[8 + i * 3], i + 1)
end
local input = ARGV[3] == '1' and n or 0
redis.call('HSET', META, 'state', 'idle', 'mode', ARGV[4], 'lease', '', 'epoch', 0, 'wseq', 0, 'wfirst', 0,
  'next', n + 1, 'rdy', '0', 'created', now, 'input', input, 'seen', 1)
for i = 7 + n * 3, #ARGV, 2 do redis.call('HSET', META, ARGV[i], ARGV[i + 1]) end
if ARGV[3] == '1' and ARGV[4] == 'running' then enqueue(META, READY) end
project(PROJ)
tail(n)
return {'OK'}
