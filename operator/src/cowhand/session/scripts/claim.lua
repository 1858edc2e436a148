-- Take the lease. A repeated call with the same nonce answers the same lease.
-- KEYS: meta, log, ready, workers, own, proj, timers.  ARGV: base, sid, wid, nonce, progress_ms, group, ready ids...
local META, LOG, READY, WORKERS, OWN, PROJ, TIMERS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local wid, nonce = ARGV[3], ARGV[4]
local m = redis.call('HMGET', META, 'state', 'next', 'lease', 'epoch', 'mode', 'model')
local state, nxt, lease, epoch, mode = m[1], m[2], m[3], m[4], m[5]
local now = now_ms()
local beat = redis.call('ZSCORE', WORKERS, wid)
-- A dead worker leaves the entry pending, so that another one takes it over.
if not beat or tonumber(beat) <= now then return {'DEADWORKER'} end
local same = state ~= false and lease ~= '' and lease == epoch .. ':' .. wid .. ':' .. nonce
local held = state ~= false and not ended(state) and not same and mode ~= 'suspended' and live(lease, WORKERS, OWN, now)
if held then mark(lease) end
for i = 7, #ARGV do redis.call('XACK', READY, ARGV[6], ARGV[i]) end
if state == false then return {'NOSESSION'} end
redis.call('HSET', META, 'rdy', '0')
if ended(state) then return {'CLOSED'} end
if same then
  return {'OK', lease, tonumber(epoch), tonumber(nxt), m[6] or ''}
end
if mode == 'suspended' then return {'SUSPENDED'} end
if held then
  nudge(lease, tonumber(nxt) - 1)
  return {'HELD', lease}
end
-- Not prev + 1 alone: after a failover that lost the tail the same number would be given twice.
local ep = math.max(tonumber(epoch) + 1, now)
local new = string.format('%d:%s:%s', ep, wid, nonce)
local seq = tonumber(nxt)
put(LOG, seq, 'session.wake', new, now, new, '')
redis.call('HSET', META, 'lease', new, 'epoch', string.format('%d', ep), 'wseq', 0, 'wfirst', 0,
  'next', seq + 1, 'state', 'running')
redis.call('ZADD', OWN, now + tonumber(ARGV[5]), SID)
redis.call('ZREM', TIMERS, SID)
project(PROJ)
tail(seq)
return {'OK', new, ep, seq + 1, m[6] or ''}
