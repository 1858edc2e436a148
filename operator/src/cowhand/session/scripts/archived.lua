-- Positions first..last are in the archive: drop them from the store. Segments follow each other without a gap, so
-- `first` must be where the store begins; a repeated call is STALE.
-- KEYS: meta, log.  ARGV: base, sid, first, last
local META, LOG = KEYS[1], KEYS[2]
local m = redis.call('HMGET', META, 'next', 'min', 'seg')
if m[1] == false then return {'NOSESSION'} end
local nxt, low = tonumber(m[1]), tonumber(m[2] or '1')
local first, last = tonumber(ARGV[3]), tonumber(ARGV[4])
if first ~= low or last < first then return {'STALE', low} end
if last >= nxt then return {'BEYOND', nxt} end
if last + 1 == nxt then
  redis.call('DEL', LOG)
else
  redis.call('XTRIM', LOG, 'MINID', string.format('%d-0', last + 1))
end
redis.call('HSET', META, 'min', last + 1, 'seg', tonumber(m[3] or '0') + 1)
return {'OK', last + 1}
