-- Renew a worker's deadline in one partition; answers its sessions with new input.
-- KEYS: workers.  ARGV: base, '', wid, ttl_ms
local now = now_ms()
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[4]), ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - 600000)
return redis.call('SPOP', BASE .. 'dirty:' .. ARGV[3], 1000)
