-- Computes exactly when a sender must be checked next (its look), and stores that in `ready`.
--
-- The limits of a sender are implemented here, in simulation.py (forecast), replay.py (audit) and
-- queue_model.py (tests), and named in explaining.py: sender_limits.py has the list.

-- ms for which the keys of a sender without waiting mail outlive its history. Then they expire, so
-- that memory depends on the number of active senders only.
local IDLE_MARGIN = 60000

local function number_or(value, default)
    if value then return tonumber(value) end
    return default
end

-- Converts a time of PostgreSQL's clock to this server's clock. 0 stands for always.
local function by_own_clock(at)
    return at > 0 and at + AHEAD or 0
end

-- Limit.PACE: the longer of the sender's own gap and its pace (pace.lua).
local function gap_with_pace(own_gap, pace) return math.max(own_gap, pace) end

--!include user

-- Returns nil if Redis does not know the sender (see life.lua), or its user's limiter, unless
-- `alone`: then the sender may have no `owner` although it has limits.
local function read_sender(sender, alone)
    local f = redis.call('HMGET', settings_of(sender), 'limit', 'gap', 'flight', 'state', 'end',
        'horizon', 'loading', 'life', 'sets', 'endpoint', 'troubles', 'open', 'probe',
        'opens', 'closes', 'cool', 'pace', 'user', 'limited', 'paused', 'wake')
    if not is_known(sender, f[1], f[8], f[9]) then return nil end
    local own_gap, pace = tonumber(f[2]), number_or(f[17], 0)
    local user = f[18] or ''
    local owner = read_user(user)
    if owner == LOST or not owner and user ~= '' and needs_limiter(f[19] == '1') then
        if not alone then return nil end
        owner = nil
    end
    return {
        id = sender,
        limit = tonumber(f[1]),
        gap = gap_with_pace(own_gap, pace),
        own_gap = own_gap,
        pace = pace,
        flight = tonumber(f[3]),
        active = f[4] == '1',
        last_end = number_or(f[5], 0),
        horizon = f[6] == 'inf' and math.huge or tonumber(f[6]),
        -- Set while a load is requested: when to request it again.
        loading = number_or(f[7], nil),
        sets = tonumber(f[9]),
        endpoint = f[10] or '',
        -- The circuit that all users of the relay share.
        shared = shared_of(f[10] or ''),
        -- The sender's circuit (circuit.lua): connection failures in a row, whether it is open, and
        -- the earliest time of its next probe.
        troubles = number_or(f[11], 0),
        open = f[12] ~= false,
        probe = number_or(f[13], 0),
        -- The current or next opening of its sending hours; a load brings the one after it.
        opens = by_own_clock(number_or(f[14], 0)),
        closes = (not f[15] or f[15] == 'inf') and math.huge or by_own_clock(tonumber(f[15])),
        -- In a cooldown: the earliest time of the next probe. 0: the sender does not cool down.
        cool = number_or(f[16], 0),
        -- When its pause ends by itself, or has ended. 0: it has no such pause.
        paused = by_own_clock(number_or(f[20], 0)),
        -- When to load it again, because the pause of a batch ends.
        wake = number_or(f[21], math.huge),
        -- '' until the first load by a process that knows users.
        user = user,
        -- The limiter of its user; nil if the user has no limits.
        owner = owner,
    }
end

-- Limit.IN_FLIGHT: how many more jobs may be in flight at once. With a gap, one send at a time: the
-- gap runs from the end of one to the start of the next. With an open circuit or in a cooldown, one
-- probe at a time.
local function places(s, in_flight)
    local most = (s.gap > 0 or s.open or s.cool > 0) and 1 or s.flight
    return math.min(most, s.limit) - in_flight
end

-- Limit.WINDOW: the instant from which the window has room for one more send, with `in_flight`
-- entries reserved: when the n-th newest end leaves the window, with n = limit - in_flight.
local function window_room_at(s, in_flight, window)
    local rank = s.limit - in_flight
    local oldest = redis.call('ZRANGE', window_of(s.id), -rank, -rank, 'WITHSCORES')
    return oldest[2] and tonumber(oldest[2]) + window or 0
end

-- Limit.USER_WINDOW and Limit.USER_GAP are the same of the limiter of its user (turns.lua).
-- The time from which the sender allows one more send: Limit.CIRCUIT (`probe`), Limit.COOLDOWN,
-- Limit.PAUSE (until a time), Limit.SENDING_HOURS, Limit.GAP and Limit.WINDOW.
local function allowed_at(s, in_flight, window)
    local gap_end = s.gap > 0 and s.last_end + s.gap or 0
    local room = window_room_at(s, in_flight, window)
    return math.max(s.probe, s.cool, s.paused or 0, s.opens, gap_end, room)
end

-- Returns the limit that decided `allowed`, by its name in WaitReason (explaining.py). It compares
-- `allowed` with the instant of each limit.
local function delay_of(s, allowed)
    local owner = s.owner
    if owner and allowed == owner.allowed then
        local by_gap = owner.gap > 0 and allowed == owner.last_end + owner.gap
        return by_gap and 'USER_GAP' or 'USER_HOURLY_LIMIT'
    end
    if allowed == s.cool then return 'COOLDOWN' end
    if allowed == s.probe then return 'ENDPOINT_DOWN' end
    if allowed == s.paused then return 'SENDER_PAUSED' end
    if allowed == s.opens then return 'SENDING_HOURS' end
    if s.gap > 0 and allowed == s.last_end + s.gap then return 'MIN_GAP' end
    return 'HOURLY_LIMIT'
end

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
