-- Write events beside a session, where nobody reads: `import` puts them in the place of its log.
-- KEYS: staged.  ARGV: base, sid, limit, expire_ms, (seq, type, eid, ts, lease, payload)*
local KEY, limit = KEYS[1], tonumber(ARGV[3])
for i = 5, #ARGV, 6 do
  if #ARGV[i + 5] > limit then return {'TOOBIG', tonumber(ARGV[i]), #ARGV[i + 5]} end
end
for i = 5, #ARGV, 6 do
  put(KEY, tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5])
end
redis.call('PEXPIRE', KEY, tonumber(ARGV[4]))
return {'OK'}
