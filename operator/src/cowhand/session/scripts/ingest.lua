-- External append, any writer, deduplicated by event id.
-- KEYS: meta, log, dedupe, ready, workers, own.  ARGV: base, sid, eid, type, payload, limit, wakes(0|1), new budget?
local META, LOG, DEDUPE, READY, WORKERS, OWN = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local m = redis.call('HMGET', META, 'state', 'next', 'lease', 'rdy', 'mode')
local state, nxt, lease, rdy, mode = m[1], m[2], m[3], m[4], m[5]
if state == false then return {'NOSESSION'} end
local dup = redis.call('HGET', DEDUPE, ARGV[3])
if dup then return {'DUP', tonumber(dup)} end
if ended(state) then return {'CLOSED', state} end
if #ARGV[5] > tonumber(ARGV[6]) then return {'TOOBIG', 0, #ARGV[5]} end
-- Small answers and interrupts always find room: they are how one gets out.
local full = no_room(#ARGV[5] + 192, ARGV[4] == 'user.message' and 0 or #ARGV[5] <= 4096 and 1 or 0.125)
if full then return full end
local now = now_ms()
local seq = tonumber(nxt)
mark(lease)
put(LOG, seq, ARGV[4], ARGV[3], now, '', ARGV[5])
redis.call('HSET', META, 'next', seq + 1)
redis.call('HSET', DEDUPE, ARGV[3], seq)
if ARGV[8] then redis.call('HSET', META, 'bud', ARGV[8]) end
tail(seq)
nudge(lease, seq)
if ARGV[7] == '1' then
  redis.call('HSET', META, 'input', seq)
  if mode == 'running' and rdy == '0' and not live(lease, WORKERS, OWN, now) then enqueue(META, READY) end
end
return {'OK', seq}
