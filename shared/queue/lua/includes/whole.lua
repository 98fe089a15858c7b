-- Whether Redis has all senders of the shard, so that each with something to do has its look.
--
-- `ready` has one member more than it has senders: the guard, which a rebuild puts there. A loss of
-- the whole key, as by an eviction, takes the guard along, so the next claim notices it. Single
-- members are lost by no eviction and no crash.

-- A score that no clock reaches, so the guard is never visited.
local GUARD_AT = 100000000000000

local function is_guarded() return redis.call('ZSCORE', READY, GUARD) ~= false end

-- `generation` is the key of the life in which the shard was completely loaded.
local function is_whole(generation)
    return redis.call('GET', generation) == LIFE and is_guarded()
end
