-- Circuits: connections that fail in a row make what would fail as well wait, unattempted, while
-- one probe at a time follows the ladder. One of the sender, in its settings: its mails alone fail.
-- One of the endpoint: those of several senders do; so that one sender in trouble stops no other.
--
-- While an endpoint's circuit is open, a sender that could send is in `held`, by the time since
-- when it could; in `ready` only for a patrol, so that a loss of these keys strands nobody. The
-- first of them is appointed to probe: a job that failed is due later than one never tried. While
-- none is open, `held` says nothing: what stands there was left by a circuit that was lost.

local FAILURES = 3
local PATROL = 30000
-- ms for which what is known of an endpoint outlives the last that is heard of it.
local KEEP = 3600000
local SEVERAL = '*'
local circuits = {}
-- What opened and closed in this script, so that whoever ran it, and nobody else, can tell. Each as
-- 'opened' or 'closed', the sender or '' (the endpoint's), open since (ms), reason.
local changes = {}

local function circuit(endpoint)
    local c = circuits[endpoint]
    if not c then
        local f = redis.call('HMGET', circuit_of(endpoint), 'failures', 'by', 'open', 'next',
            'probe', 'until', 'life')
        if f[7] and f[7] ~= LIFE then
            -- Its times may be of another clock.
            redis.call('DEL', circuit_of(endpoint))
            f = {}
        end
        c = {
            id = endpoint,
            failures = tonumber(f[1] or 0),
            -- The sender that they are of, or SEVERAL.
            by = f[2],
            open = f[3] and true,
            next = tonumber(f[4] or 0),
            -- The probe under way, and when its lease runs out.
            probe = f[5],
            busy_until = tonumber(f[6] or 0),
        }
        circuits[endpoint] = c
    end
    return c
end

local function write_circuit(c, ...)
    redis.call('HSET', circuit_of(c.id), 'life', LIFE, ...)
    redis.call('PEXPIRE', circuit_of(c.id), KEEP + math.max(0, c.next - NOW))
end

-- Whether one more job may be sent to the endpoint now.
local function admits(c) return not c.open or math.max(c.next, c.busy_until) <= NOW end

-- Lets the sender that could send for the longest time look when the next probe may be.
local function appoint(c)
    local first = redis.call('ZRANGE', held_of(c.id), 0, 0)[1]
    if first then redis.call('ZADD', READY, 'LT', math.max(c.next, c.busy_until), first) end
end

local function leave_held(c, id)
    if c.open and redis.call('ZREM', held_of(c.id), id) == 1 then appoint(c) end
end

-- Returns when to look at a sender that its own limits allow to send from `at` on.
local function through_circuit(s, at)
    local c = circuit(s.endpoint)
    if not c.open then return at end
    if at > NOW or admits(c) then
        leave_held(c, s.id)
        return at
    end
    local held = held_of(c.id)
    redis.call('ZADD', held, at, s.id)
    redis.call('PEXPIRE', held, KEEP + math.max(0, c.next - NOW))
    if redis.call('ZRANGE', held, 0, 0)[1] ~= s.id then return NOW + PATROL end
    return math.min(NOW + PATROL, math.max(c.next, c.busy_until))
end

local function begin_probe(s, member, until_ms)
    if s.open then redis.call('HSET', settings_of(s.id), 'prober', member) end
    local c = circuit(s.endpoint)
    if not c.open then return end
    c.probe, c.busy_until = s.id .. ' ' .. member, until_ms
    write_circuit(c, 'probe', c.probe, 'until', until_ms)
    redis.call('ZREM', held_of(c.id), s.id)
    -- Should whoever probes die.
    appoint(c)
end

-- Moves the end of a probe whose lease was renewed.
local function extend_probe(s, member, until_ms)
    local c = circuit(s.endpoint)
    if c.probe ~= s.id .. ' ' .. member then return end
    c.busy_until = until_ms
    write_circuit(c, 'until', until_ms)
end

-- `lease`: of one that came to nothing; it ends no other's probe.
local function end_probe(s, member, lease)
    local c = circuit(s.endpoint)
    if c.probe ~= s.id .. ' ' .. member or (lease and lease ~= c.busy_until) then return end
    c.busy_until, c.ended = 0, c.probe
    redis.call('HDEL', circuit_of(c.id), 'probe', 'until')
    c.probe = false
    appoint(c)
end

local function has_closed(key, sender)
    local f = redis.call('HMGET', key, 'open', 'reason')
    changes[#changes + 1] = { 'closed', sender, f[1], f[2] or '' }
end

local function has_opened(sender, reason)
    changes[#changes + 1] = { 'opened', sender, NOW, reason }
end

local function forget_troubles(s)
    if s.troubles == 0 then return end
    if s.open then has_closed(settings_of(s.id), s.id) end
    redis.call('HDEL', settings_of(s.id), 'troubles', 'open', 'probe', 'rung', 'prober', 'reason')
    s.troubles, s.open, s.probe = 0, false, 0
end

-- The endpoint answers: whoever is held may send again, as its own limits say.
local function answered(s)
    forget_troubles(s)
    local c = circuit(s.endpoint)
    if c.failures == 0 then return end
    if c.open then
        has_closed(circuit_of(c.id), '')
        local held = redis.call('ZRANGE', held_of(c.id), 0, -1, 'WITHSCORES')
        for i = 1, #held, 2 do redis.call('ZADD', READY, 'LT', held[i + 1], held[i]) end
    end
    redis.call('DEL', circuit_of(c.id), held_of(c.id))
    circuits[c.id] = nil
end

local function rung_of(ladder, number)
    local wait
    for ms in string.gmatch(ladder, '%d+') do
        wait = tonumber(ms)
        number = number - 1
        if number == 0 then break end
    end
    return wait
end

-- The connection of this attempt failed. Returns a sender whose troubles turn out to be those of
-- the endpoint, if there is one.
local function failed(s, member, reason, ladder)
    local c, settings = circuit(s.endpoint), settings_of(s.id)
    if s.open and redis.call('HGET', settings, 'prober') == member then
        local rung = redis.call('HINCRBY', settings, 'rung', 1)
        s.probe = NOW + rung_of(ladder, rung)
        redis.call('HSET', settings, 'probe', s.probe, 'reason', reason)
    end
    if c.open then
        -- One that was under way when the circuit opened says nothing new.
        if c.ended ~= s.id .. ' ' .. member then return nil end
        c.next = NOW + rung_of(ladder, redis.call('HINCRBY', circuit_of(c.id), 'rung', 1))
        write_circuit(c, 'next', c.next, 'reason', reason)
        appoint(c)
        return nil
    end
    if s.open then
        -- Its own trouble: that alone opens no circuit of the endpoint.
        if c.failures > 0 then write_circuit(c, 'reason', reason) end
        return nil
    end
    local before = c.by
    c.failures = c.failures + 1
    c.by = (not before or before == s.id) and s.id or SEVERAL
    write_circuit(c, 'failures', c.failures, 'by', c.by, 'reason', reason)
    s.troubles = s.troubles + 1
    redis.call('HSET', settings, 'troubles', s.troubles, 'reason', reason)
    if c.failures >= FAILURES and c.by == SEVERAL then
        c.open, c.next = true, NOW + rung_of(ladder, 1)
        redis.call('DEL', held_of(c.id))
        write_circuit(c, 'open', NOW, 'next', c.next, 'rung', 1)
        has_opened('', reason)
        forget_troubles(s)
        return before ~= SEVERAL and before or nil
    elseif s.troubles >= FAILURES then
        s.open, s.probe = true, NOW + rung_of(ladder, 1)
        redis.call('HSET', settings, 'open', NOW, 'probe', s.probe, 'rung', 1)
        has_opened(s.id, reason)
    end
    return nil
end
