-- Drop the read prefix of the ready stream. Not XDEL: that makes the group's lag unknown.
-- KEYS: ready.  ARGV: base, '', group
local READY = KEYS[1]
local pending = redis.pcall('XPENDING', READY, ARGV[3])
if pending.err then return 0 end -- NOGROUP: no harness has run here yet
local low = pending[1] > 0 and pending[2] or nil
if not low then
  for _, g in ipairs(redis.call('XINFO', 'GROUPS', READY)) do
    local name, last
    for i = 1, #g, 2 do
      if g[i] == 'name' then name = g[i + 1] end
      if g[i] == 'last-delivered-id' then last = g[i + 1] end
    end
    if name == ARGV[3] then low = last end
  end
end
if not low or low == '0-0' then return 0 end
return redis.call('XTRIM', READY, 'MINID', low)
