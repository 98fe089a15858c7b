-- Whether Redis has all senders of the shard, so that each with something to do has its look.
--
-- `ready` has one member more than it has senders: the guard, which a rebuild puts there. If
-- the whole key is lost, as by an eviction, the guard is lost too, so the next claim notices it. No
-- eviction and no crash removes single members.

-- A score that no clock reaches, so the guard is never visited.
local GUARD_AT = 100000000000000

local function is_guarded() return redis.call('ZSCORE', READY, GUARD) ~= false end

-- `generation` is the key of the life in which the shard was completely loaded.
local function is_whole(generation)
    return redis.call('GET', generation) == LIFE and is_guarded()
end
