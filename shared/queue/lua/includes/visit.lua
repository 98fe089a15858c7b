-- Visits one sender: claims its jobs as far as all limits allow, and stores its next look. This is
-- a part of claim.lua and uses its variables.

-- Returns whether the next job waits for limits, not for room in the dispatcher.
local function take(s)
    local leases, due, owner = lease_of(s.id), due_of(s.id), s.owner
    local in_flight = redis.call('ZCARD', leases)
    while room_of(s.user) > 0 and places(s, in_flight) > 0 do
        local allowed = allowed_at(s, in_flight, window)
        if not owner_admits(s, window, turn) then return true end
        if owner then
            local used = redis.call('ZCARD', lease_of(owner.id))
            owner.allowed = allowed_at(owner, used, window)
            allowed = math.max(allowed, owner.allowed)
        end
        if allowed > NOW or NOW >= s.closes then return true end
        local by = NOW - AHEAD
        local first = redis.call('ZRANGEBYSCORE', due, '-inf', by, 'WITHSCORES', 'LIMIT', 0, 1)
        if not first[1] or not admits_sender(s) then return true end
        local due_at = tonumber(first[2]) + AHEAD
        local delayed_by = allowed > due_at and delay_of(s, allowed) or ''
        redis.call('ZREM', due, first[1])
        redis.call('ZADD', leases, NOW + lease, first[1])
        if owner then
            redis.call('ZADD', lease_of(owner.id), NOW + lease, first[1])
            redis.call('ZREM', turns_of(s.user), s.id)
            turn = nil
        end
        begin_probe(s, first[1], NOW + lease)
        in_flight = in_flight + 1
        taken = taken + 1
        of_user[s.user] = (of_user[s.user] or 0) + 1
        claims[#claims + 1] = s.id
        claims[#claims + 1] = first[1]
        claims[#claims + 1] = NOW - math.max(allowed, due_at)
        claims[#claims + 1] = NOW + lease
        claims[#claims + 1] = tonumber(first[2])
        claims[#claims + 1] = s.cool > 0 and 1 or 0
        claims[#claims + 1] = delayed_by
        claims[#claims + 1] = s.user
    end
    -- With a gap and no job in flight, the user had no room: the next job waits for the dispatcher.
    return s.gap > 0 and in_flight > 0
end

local function forget_old_ends(s, windows)
    local keep = math.max(window, s.gap) * windows
    redis.call('ZREMRANGEBYSCORE', window_of(s.id), '-inf', NOW - keep)
end

local function visit(sender)
    local s = read_sender(sender)
    if not s then
        -- Some keys are lost or from an earlier life: send nothing before a load.
        loads[#loads + 1] = sender
        redis.call('ZADD', READY, NOW + patience, sender)
        return
    end
    if not expire_leases(s) or s.owner and not expire_leases(s.owner) then
        redis.call('ZADD', READY, NOW + ASKED_AGAIN, sender)
        return
    end
    if s.owner then forget_old_ends(s.owner, 2) end
    local has_room = room_of(s.user) > 0
    local limited = not s.active or take(s)
    -- Not before `take`, which computes a job's lateness from the ends that left the window. If
    -- the next job waits for room in the dispatcher, its lateness is still to be computed.
    forget_old_ends(s, limited and 1 or 2)
    if s.horizon < math.huge and redis.call('ZCARD', due_of(sender)) < low then
        s.loading = s.loading or NOW
    end
    if s.active and NOW >= s.closes and redis.call('EXISTS', due_of(sender)) == 1 then
        s.loading = s.loading or NOW
    end
    if NOW >= s.wake then s.loading = s.loading or NOW end
    if s.loading and s.loading <= NOW then
        s.loading = NOW + patience
        redis.call('HSET', settings_of(sender), 'loading', s.loading)
        loads[#loads + 1] = sender
    end
    schedule_look(s, window)
    if not has_room then
        local look = redis.call('ZSCORE', READY, sender)
        if look and tonumber(look) <= NOW then park(s, look) end
    end
end
