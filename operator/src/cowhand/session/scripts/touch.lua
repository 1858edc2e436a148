-- Push the progress deadline; with a wseq also check that the store still has that append.
-- KEYS: meta, own.  ARGV: base, sid, lease, progress_ms, wseq ('' = any)
local META, OWN = KEYS[1], KEYS[2]
local m = redis.call('HMGET', META, 'state', 'lease', 'wseq')
if m[1] == false then return {'NOSESSION'} end
if m[1] == 'closed' then return {'CLOSED'} end
if m[2] ~= ARGV[3] then return {'FENCED', m[2]} end
if ARGV[5] ~= '' and tonumber(m[3]) < tonumber(ARGV[5]) then return {'GAP', tonumber(m[3])} end
redis.call('ZADD', OWN, now_ms() + tonumber(ARGV[4]), SID)
return {'OK'}
