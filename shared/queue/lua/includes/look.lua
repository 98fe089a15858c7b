-- Computes exactly when a sender must be checked next (its look), and stores that in `ready`.

-- ms for which the keys of a sender without waiting mail outlive its history. Then they expire, so
-- that memory depends on the number of active senders only.
local IDLE_MARGIN = 60000

local function store_sets(s)
    local sets = sets_of(s.id)
    if sets ~= s.sets then
        s.sets = sets
        redis.call('HSET', settings_of(s.id), 'sets', sets)
    end
end

-- Returns when the first lease expires, and how many there are. Unless the jobs in flight are
-- settled before, that is the next event.
local function first_expiry(s)
    local leases = lease_of(s.id)
    local in_flight = redis.call('ZCARD', leases)
    if in_flight == 0 then return math.huge, 0 end
    return tonumber(redis.call('ZRANGE', leases, 0, 0, 'WITHSCORES')[2]), in_flight
end

local function expire_history(s, window)
    local keep = math.max(window, s.gap) + IDLE_MARGIN
    redis.call('PEXPIRE', settings_of(s.id), keep)
    redis.call('PEXPIRE', window_of(s.id), keep + IDLE_MARGIN)
end

--!include turns

-- Puts the sender into `ready` for the next instant at which there can be something to do.
local function schedule_look(s, window)
    store_sets(s)
    local look, in_flight = first_expiry(s)
    local first = redis.call('ZRANGE', due_of(s.id), 0, 0, 'WITHSCORES')[2]
    if s.loading then
        -- A load was requested: check when it is overdue, since the dispatcher may have died.
        look = math.min(look, s.loading)
    end
    -- A load sets the next time. Until it has come, the request decides when to ask again.
    if not s.loading then look = math.min(look, s.wake) end
    local sends = math.huge
    -- Limit.PAUSE: a sender that is not active has no next send.
    if s.active and first and places(s, in_flight) > 0 then
        sends = math.max(tonumber(first) + AHEAD, allowed_at(s, in_flight, window))
        -- Too late for this opening: when it ends, a load brings the next one.
        if math.max(sends, NOW) >= s.closes then sends = s.loading and math.huge or s.closes end
    end
    look = math.min(look, through_user(s, through_circuit(s, sends), window))
    if s.owner then schedule_user(s.owner, window) end
    if look < math.huge then
        redis.call('ZADD', READY, look, s.id)
        return
    end
    redis.call('ZREM', READY, s.id)
    if in_flight == 0 and not first then expire_history(s, window) end
end

local function first_look()
    local first = redis.call('ZRANGE', READY, 0, 0, 'WITHSCORES')
    return first[1] and first[1] ~= GUARD and tonumber(first[2]) or nil
end

-- Wakes sleeping dispatchers if there is something to do before the time they sleep until.
-- `asleep` has the latest of these times. If no dispatcher sleeps, this costs one GET.
local function wake_sleepers()
    local asleep = redis.call('GET', ASLEEP)
    if not asleep then return end
    local look = first_look()
    if look and (asleep == 'inf' or look < tonumber(asleep)) then
        redis.call('DEL', ASLEEP)
        redis.call('PUBLISH', WAKE, '1')
    end
end
