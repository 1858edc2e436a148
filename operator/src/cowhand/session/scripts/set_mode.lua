-- Suspend or resume, with its event, deduplicated by event id.
-- KEYS: meta, log, dedupe, ready, workers, own, proj.  ARGV: base, sid, eid, type, payload, limit, mode
local META, LOG, DEDUPE, READY, WORKERS, OWN, PROJ = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local m = redis.call('HMGET', META, 'state', 'next', 'lease', 'rdy', 'input', 'seen')
local state, nxt, lease, rdy = m[1], m[2], m[3], m[4]
if state == false then return {'NOSESSION'} end
local dup = redis.call('HGET', DEDUPE, ARGV[3])
if dup then return {'DUP', tonumber(dup)} end
if ended(state) then return {'CLOSED', state} end
if #ARGV[5] > tonumber(ARGV[6]) then return {'TOOBIG', 0, #ARGV[5]} end
local now = now_ms()
local seq = tonumber(nxt)
mark(lease)
put(LOG, seq, ARGV[4], ARGV[3], now, '', ARGV[5])
redis.call('HSET', META, 'next', seq + 1, 'mode', ARGV[7])
redis.call('HSET', DEDUPE, ARGV[3], seq)
tail(seq)
nudge(lease, seq)
if ARGV[7] == 'running' and rdy == '0' and not live(lease, WORKERS, OWN, now) then
  if lease ~= '' or state ~= 'idle' or tonumber(m[5]) >= tonumber(m[6]) then enqueue(META, READY) end
end
project(PROJ)
return {'OK', seq}
