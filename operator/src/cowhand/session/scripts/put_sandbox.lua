-- Write the newest record of a sandbox. KEYS: sandbox.  ARGV: base, sandbox uid, record, expire_ms (0: keep)
local KEY = KEYS[1]
if not newer(redis.call('GET', KEY), ARGV[3]) then return {'STALE'} end
redis.call('SET', KEY, ARGV[3])
if ARGV[4] ~= '0' then redis.call('PEXPIRE', KEY, ARGV[4]) end
return {'OK'}
