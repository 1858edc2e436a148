-- Heal a session that should be in the ready stream and is not (an entry or a timer lost with the tail of a store).
-- KEYS: meta, ready, workers, own, timers.  ARGV: base, sid, group
local META, READY, WORKERS, OWN, TIMERS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local m = redis.call('HMGET', META, 'state', 'lease', 'mode', 'rdy', 'input', 'seen')
if m[1] == false or ended(m[1]) or m[3] ~= 'running' then return 0 end
if live(m[2], WORKERS, OWN, now_ms()) then return 0 end
if m[4] == '0' then
  if m[2] == '' and tonumber(m[5]) < tonumber(m[6]) then
    if m[1] == 'idle' then return 0 end
    local timer = redis.call('ZSCORE', TIMERS, SID)
    if timer and tonumber(timer) > now_ms() then return 0 end
  end
  enqueue(META, READY)
  return 1
end
if #redis.call('XRANGE', READY, m[4], m[4]) == 1 then
  local pending = redis.pcall('XPENDING', READY, ARGV[3], m[4], m[4], 1)
  if pending.err or #pending == 1 then return 0 end -- NOGROUP: no harness has run here, the first reads it all
  local groups = redis.call('XINFO', 'GROUPS', READY)
  for _, g in ipairs(groups) do
    for i = 1, #g, 2 do
      if g[i] == 'last-delivered-id' then
        local dms, dseq = string.match(g[i + 1], '^(%d+)-(%d+)$')
        local ems, eseq = string.match(m[4], '^(%d+)-(%d+)$')
        dms, dseq, ems, eseq = tonumber(dms), tonumber(dseq), tonumber(ems), tonumber(eseq)
        if ems > dms or (ems == dms and eseq > dseq) then return 0 end
      end
    end
  end
end
enqueue(META, READY)
return 1
