-- The pace of a sender whose server says that mail comes too fast. It is a gap (ms) that doubles
-- with each such reply and shrinks with each accepted mail, until the sender's own gap is longer.
--
-- With a pace, a sender has one send at a time. If other sends are in flight, they began before the
-- pace applied, so their replies do not change it: fifty refusals at once double it twice.

local PACE_FIRST = 125
local PACE_MOST = 60000
local PACE_SHRINKS_TO = 0.9

local function set_pace(s, pace)
    s.pace = pace
    s.gap = gap_with_pace(s.own_gap, pace)
    if pace > 0 then
        redis.call('HSET', settings_of(s.id), 'pace', pace)
    else
        redis.call('HDEL', settings_of(s.id), 'pace')
    end
end

local function holds_pace(s)
    return redis.call('EXISTS', lease_of(s.id)) == 0
end

local function slow_down(s)
    if s.pace > 0 and not holds_pace(s) then return end
    set_pace(s, math.min(PACE_MOST, math.max(2 * s.gap, PACE_FIRST)))
end

local function speed_up(s)
    if s.pace == 0 or not holds_pace(s) then return end
    local pace = math.floor(s.pace * PACE_SHRINKS_TO)
    set_pace(s, pace > math.max(s.own_gap, PACE_FIRST / 2) and pace or 0)
end
