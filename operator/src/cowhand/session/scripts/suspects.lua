-- Leased sessions of a partition whose holder is dead or stuck, at most 1000.
-- KEYS: own, workers.  ARGV: base, ''
local now, found = now_ms(), {}
local own = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
local beats = {}
for i = 1, #own, 2 do
  local wid = worker_of(redis.call('HGET', BASE .. 's:' .. own[i] .. ':m', 'lease')) or ''
  if beats[wid] == nil then beats[wid] = tonumber(redis.call('ZSCORE', KEYS[2], wid) or '0') end
  if tonumber(own[i + 1]) <= now or beats[wid] <= now then found[#found + 1] = own[i] end
  if #found == 1000 then break end
end
return found
