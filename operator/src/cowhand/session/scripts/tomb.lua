-- "This run was already made": who made it. '?<sid>' while the session is being created, '<sid>' afterwards.
-- KEYS: tomb.  ARGV: base, sid, expected: a value that may be replaced (its creator died before the session existed)
local TOMB = KEYS[1]
local found = redis.call('GET', TOMB)
if found == SID then return found end
if found == false or found == '?' .. SID or found == ARGV[3] then
  redis.call('SET', TOMB, '?' .. SID)
  return '?' .. SID
end
return found
