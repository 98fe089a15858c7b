-- The limits of a sender: when its next send is allowed, and which limit decided that.
--
-- The limits of a sender are implemented here, in simulation.py (forecast), replay.py (audit) and
-- queue_model.py (tests), and named in explaining.py: sender_limits.py has the list.

-- Limit.PACE: the longer of the sender's own gap and its pace (pace.lua).
local function gap_with_pace(own_gap, pace) return math.max(own_gap, pace) end

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
