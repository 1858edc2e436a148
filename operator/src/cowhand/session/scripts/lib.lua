-- Put before every script. ARGV[1] is always the base ("cowhand:<ns>:{pNN}:"), ARGV[2] the session id:
-- dirty sets and channels are named from them, in the same slot as the declared keys. While a slot moves to another
-- node of a cluster, a key that is not declared may be gone, and its use ends the script: before the first write.
local BASE, SID = ARGV[1], ARGV[2]

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Position `seq` of the log. The five fields keep their order: Redis stores equal names once per node.
local function put(log, seq, kind, eid, now, lease, payload)
  redis.call('XADD', log, string.format('%d-0', seq), 't', kind, 'e', eid, 'ts', now, 'w', lease, 'p', payload)
end

local function tail(seq)
  redis.call('PUBLISH', BASE .. 't:' .. SID, seq)
end

local function project(proj)
  redis.call('SADD', proj, SID)
  redis.call('PUBLISH', BASE .. 'p', SID)
end

local function worker_of(lease)
  return lease and string.match(lease, '^%d+:([^:]+):')
end

-- Both deadlines must lie ahead: the worker's heartbeat and the session's progress.
local function live(lease, workers, own, now)
  local wid = worker_of(lease)
  if not wid then return false end
  local beat = redis.call('ZSCORE', workers, wid)
  local progress = redis.call('ZSCORE', own, SID)
  return beat and tonumber(beat) > now and progress and tonumber(progress) > now
end

-- Tell the holder, even one that looks dead: it may be back, and the dirty set heals a lost nudge. `mark` comes
-- before the first write, `nudge` after the last.
local function mark(lease)
  local wid = worker_of(lease)
  if not wid then return end
  local dirty = BASE .. 'dirty:' .. wid
  redis.call('SADD', dirty, SID)
  redis.call('PEXPIRE', dirty, 600000)
end

local function nudge(lease, seq)
  local wid = worker_of(lease)
  if wid then redis.call('PUBLISH', BASE .. 'n:' .. wid, SID .. ' ' .. seq) end
end

-- One entry of the ready stream at most: meta.rdy is its id, '0' for none.
local function enqueue(meta, ready, sid)
  redis.call('HSET', meta, 'rdy', redis.call('XADD', ready, '*', 's', sid or SID))
end

-- Count `size` bytes against the tenant's quota; answers what to reply if there is no room for them. Only the
-- control plane writes the quota: id of a measurement, bytes left then, limit, bytes used then. What was written
-- since is counted in a key of the tenant's own: whoever forges it is found out by the next measurement.
-- `part` of the limit may be used on top: so much that a turn that runs can end.
local function no_room(size, part)
  local prefix, ns, tag = string.match(BASE, '^([^:]+):([^:]+):([^:]+):$')
  local quota = redis.call('GET', prefix .. ':' .. tag .. ':quota.' .. ns)
  local id, left, limit, used = string.match(quota or '', '^(%d+) (%-?%d+) (%d+) (%d+)$')
  if not id then return nil end
  local grown = BASE .. 'grown:' .. id
  local sum = (tonumber(redis.call('GET', grown) or '0') or 0) + size
  if sum > left + limit * part then return {'QUOTA', used + sum - size, tonumber(limit)} end
  redis.call('SET', grown, string.format('%d', sum), 'PX', 600000)
  return nil
end

local function ended(state)
  return state == 'closed' or state == 'terminated'
end

-- A hand never comes back from Lost, a Ready one is not overwritten by Pending or Failed, nor by an older owner.
local function newer(old, new)
  if not old then return true end
  local state, epoch = string.match(old, '^{"state":"(%a+)","owner_epoch":(%d+)')
  local new_state, new_epoch = string.match(new, '^{"state":"(%a+)","owner_epoch":(%d+)')
  if new_state == 'Lost' then return true end
  if state == 'Lost' then return false end
  if state == 'Ready' then return new_state == 'Ready' and tonumber(new_epoch) >= tonumber(epoch) end
  return true
end

