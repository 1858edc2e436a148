-- The slots of one model workspace, shared by all tenants: who may send a request now. Start-time fair queueing: each
-- tenant has a line; whose last turn lies furthest back (weighted) is next, and one that comes anew begins now.
-- KEYS: pool.  ARGV: base, '', ns, client, limit, weight, waiting, hold_ms, want_ms, pause_ms,
--   n_done, n_held, done ids, held ids, wanted ids (the first of those that wait)
-- Answers pause_ms, then the ids of the wanted that got a slot.
local POOL, NS, CLIENT = KEYS[1], ARGV[3], ARGV[4]
local limit, weight, waiting = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local now, total, virtual, opens = now_ms(), 0, 0, 0
local want, finish, weights, gone = {}, {}, {}, {}

local all = redis.call('HGETALL', POOL)
for i = 1, #all, 2 do
  local kind, ns = string.match(all[i], '^(%a):([^:]*)')
  local value = all[i + 1]
  if kind == 'v' then virtual = tonumber(value)
  elseif kind == 'u' then opens = tonumber(value)
  elseif kind == 'f' then finish[ns] = tonumber(value)
  elseif kind == 'h' then
    if tonumber(value) > now then total = total + 1 else gone[#gone + 1] = all[i] end
  else
    local n, share, ends = string.match(value, '^(%d+) ([%d.]+) (%d+)$')
    if tonumber(ends) > now then
      if all[i] ~= 'w:' .. NS .. ':' .. CLIENT then want[ns] = (want[ns] or 0) + tonumber(n) end
      weights[ns] = tonumber(share)
    else gone[#gone + 1] = all[i] end
  end
end
for ns, tag in pairs(finish) do
  -- Whose last turn is over has no claim and no debt.
  if tag <= virtual then
    finish[ns] = nil
    gone[#gone + 1] = 'f:' .. ns
  end
end
for _, name in ipairs(gone) do redis.call('HDEL', POOL, name) end

local function slot(id) return 'h:' .. NS .. ':' .. CLIENT .. '.' .. id end
local at, n_done, n_held = 13, tonumber(ARGV[11]), tonumber(ARGV[12])
for i = at, at + n_done - 1 do
  total = total - redis.call('HDEL', POOL, slot(ARGV[i]))
end
at = at + n_done
for i = at, at + n_held - 1 do
  -- One that had expired is counted again: its request does run.
  total = total + redis.call('HSET', POOL, slot(ARGV[i]), now + tonumber(ARGV[8]))
end
at = at + n_held
if tonumber(ARGV[10]) > 0 then
  opens = math.max(opens, now + tonumber(ARGV[10]))
  redis.call('HSET', POOL, 'u:', opens)
end

local function start(ns) return math.max(finish[ns] or 0, virtual) end
-- Requests of others that are due before one that starts at `mine`.
local function before(mine)
  local n = 0
  for ns, count in pairs(want) do
    if ns ~= NS and start(ns) < mine then
      n = n + math.min(count, math.ceil((mine - start(ns)) * weights[ns] - 0.000001))
    end
  end
  return n
end

local granted = {}
for i = at, #ARGV do
  -- Asked again because the answer was lost: it has its slot.
  if redis.call('HEXISTS', POOL, slot(ARGV[i])) == 0 then
    local mine = start(NS)
    if now < opens or total + before(mine) >= limit then break end
    redis.call('HSET', POOL, slot(ARGV[i]), now + tonumber(ARGV[8]))
    total, virtual = total + 1, mine
    finish[NS] = mine + 1 / weight
  end
  waiting = waiting - 1
  granted[#granted + 1] = ARGV[i]
end
if finish[NS] then
  redis.call('HSET', POOL, 'v:', string.format('%.6f', virtual), 'f:' .. NS, string.format('%.6f', finish[NS]))
end
local name = 'w:' .. NS .. ':' .. CLIENT
if waiting > 0 then
  redis.call('HSET', POOL, name, string.format('%d %s %d', waiting, ARGV[6], now + tonumber(ARGV[9])))
else
  redis.call('HDEL', POOL, name)
end
redis.call('PEXPIRE', POOL, 600000)
return {math.max(0, opens - now), unpack(granted)}
