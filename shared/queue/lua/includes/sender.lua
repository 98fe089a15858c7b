-- Reads what Redis knows of a sender: its limits, its history, its endpoint, its user.

local function number_or(value, default)
    if value then return tonumber(value) end
    return default
end

-- Converts a time of PostgreSQL's clock to this server's clock. 0 stands for always.
local function by_own_clock(at)
    return at > 0 and at + AHEAD or 0
end

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
