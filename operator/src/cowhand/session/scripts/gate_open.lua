-- A request that was let through in `round` was answered: the gate is open, and the line moves twice as fast.
-- KEYS: gate.  ARGV: base, '', round
local GATE = KEYS[1]
local g = redis.call('HMGET', GATE, 'shut', 'round', 'gap')
-- Of an older round: sent before the endpoint refused, it says nothing of what comes.
if not g[2] or g[2] ~= ARGV[3] then return {0} end
if g[1] == '1' then
  redis.call('HSET', GATE, 'shut', '0', 'fails', 0, 'probe', 0)
else
  redis.call('HSET', GATE, 'gap', math.floor(tonumber(g[3] or '0') / 2))
end
return {1}
