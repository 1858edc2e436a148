-- The endpoint refused a request that was let through in `round`: nobody sends before its time is over.
-- KEYS: gate.  ARGV: base, '', round, delay_ms ('' = it named none), kind, first_ms, cap_ms, gap_ms, expire_ms
local GATE = KEYS[1]
local g = redis.call('HMGET', GATE, 'shut', 'until', 'round', 'fails', 'tail')
local now, round, fails = now_ms(), tonumber(g[3] or '0'), tonumber(g[4] or '0')
local opens = tonumber(g[2] or '0')
local delay = tonumber(ARGV[4])
if tonumber(ARGV[3]) == round then
  fails = fails + 1
  if not delay then delay = math.min(tonumber(ARGV[7]), tonumber(ARGV[6]) * 2 ^ math.min(fails - 1, 20)) end
  opens = math.max(opens, now + math.floor(delay))
  redis.call('HSET', GATE, 'shut', '1', 'until', opens, 'round', round + 1, 'fails', fails, 'probe', 0,
    'tail', opens, 'gap', ARGV[8], 'kind', ARGV[5])
elseif delay and g[1] == '1' and now + delay > opens then
  -- One of many that were under way when it was shut: it may only ask for a longer wait.
  opens = now + math.floor(delay)
  redis.call('HSET', GATE, 'until', opens, 'tail', math.max(opens, tonumber(g[5] or '0')))
end
redis.call('PEXPIRE', GATE, math.max(tonumber(ARGV[9]), opens - now + tonumber(ARGV[9])))
return {opens}
