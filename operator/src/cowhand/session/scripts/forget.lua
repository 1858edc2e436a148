-- Remove a consumer of the ready group that is idle for long; never one with pending entries, they would be lost.
-- KEYS: ready.  ARGV: base, '', group, consumer
local pending = redis.call('XPENDING', KEYS[1], ARGV[3], '-', '+', 1, ARGV[4])
if #pending > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[3], ARGV[4])
return 1
