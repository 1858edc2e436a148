-- A reader that stops without claiming: nominate the session for another one.
-- KEYS: meta, ready.  ARGV: base, sid, group, entry id
redis.call('XACK', KEYS[2], ARGV[3], ARGV[4])
if redis.call('HGET', KEYS[1], 'rdy') == ARGV[4] then
  enqueue(KEYS[1], KEYS[2])
  return {'OK'}
end
return {'STALE'}
