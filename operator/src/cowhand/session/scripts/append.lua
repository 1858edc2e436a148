-- Fenced append by the lease holder, exactly once by wseq. What begins work is refused while the session is suspended.
-- KEYS: meta, log, own, proj.  ARGV: base, sid, lease, wseq, progress_ms, limit, status ('' = keep), (type, payload)*
local META, LOG, OWN, PROJ = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local lease = ARGV[3]
local m = redis.call('HMGET', META, 'state', 'lease', 'wseq', 'wfirst', 'next', 'mode')
if m[1] == false then return {'NOSESSION'} end
if m[1] == 'closed' then return {'CLOSED'} end
if m[2] ~= lease then return {'FENCED', m[2]} end
local wseq, last = tonumber(ARGV[4]), tonumber(m[3])
if wseq == last then return {'DUP', tonumber(m[4])} end
if wseq ~= last + 1 then return {'GAP', last} end
if m[6] == 'suspended' then
  for i = 8, #ARGV, 2 do
    if ARGV[i] == 'tool.started' or ARGV[i] == 'span.model_request_start' then return {'NOTRUNNING'} end
  end
end
local limit = tonumber(ARGV[6])
for i = 9, #ARGV, 2 do
  if #ARGV[i] > limit then return {'TOOBIG', (i - 9) / 2, #ARGV[i]} end
end
local size = #ARGV[7]
for i = 9, #ARGV, 2 do size = size + #ARGV[i] + 128 end
local full = no_room(size, 0.125)
if full then return full end
local first = tonumber(m[5])
local nxt, now = first, now_ms()
for i = 8, #ARGV, 2 do
  put(LOG, nxt, ARGV[i], string.format('%d.%d@%s', wseq, (i - 8) / 2, lease), now, lease, ARGV[i + 1])
  nxt = nxt + 1
end
redis.call('HSET', META, 'next', nxt, 'wseq', wseq, 'wfirst', first)
redis.call('ZADD', OWN, now + tonumber(ARGV[5]), SID)
if ARGV[7] ~= '' then
  redis.call('HSET', META, 'st', ARGV[7])
  project(PROJ)
end
tail(nxt - 1)
return {'OK', first}
