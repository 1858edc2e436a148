-- Ask for a model request. While the gate is shut everybody waits, each until a place of their own in the line;
-- when its time is over one request goes first (the probe), and what it meets decides.
-- KEYS: gate.  ARGV: base, '', place ('' = none yet), probe_ms, ramp_ms, look_ms
-- Answers GO round tell(0|1), or WAIT round place kind.
local GATE = KEYS[1]
local g = redis.call('HMGET', GATE, 'shut', 'until', 'round', 'probe', 'tail', 'gap', 'kind')
local now, round = now_ms(), tonumber(g[3] or '0')
local place, tail, gap = tonumber(ARGV[3]) or 0, tonumber(g[5] or '0'), tonumber(g[6] or '0')
local from
if g[1] == '1' then
  local opens, probe = tonumber(g[2]), tonumber(g[4])
  if now >= opens and now >= probe then
    redis.call('HSET', GATE, 'probe', now + tonumber(ARGV[4]))
    return {'GO', round, 1}
  end
  -- While the probe is under way nobody knows when it ends: look again soon.
  from = now < opens and opens or now + tonumber(ARGV[6])
else
  if tail <= now then return {'GO', round, 0} end
  if place > 0 and place <= now then return {'GO', round, 1} end
  from = now
end
if place <= now or place < from then
  -- The line grows by `gap` for each, but not without end: then places are shared.
  place = math.min(math.max(tail, from), from + tonumber(ARGV[5]))
  redis.call('HSET', GATE, 'tail', place + gap)
end
return {'WAIT', round, place, g[7] or ''}
