-- Circuit breakers. A circuit stops sends to an endpoint after three connection failures in a row.
-- While it is open, one probe at a time is sent, with the waits of the backoff schedule in between.
-- A sender's circuit (in its settings) opens if only its own connections fail, an endpoint's if
-- those of several senders fail. So one failing sender stops no other.
--
-- This file decides which mail an open circuit lets through. circuit_changes.lua opens and closes
-- circuits.
--
-- The endpoint `relay:<user>` is the operator's relay for the mail of one user. Its sends also
-- need the circuit `relay`, which all users share. A failure counts for `relay` if it came before
-- MAIL: no mail can cause that. Every other failure counts only for the user.
--
-- While an endpoint's circuit is open, the senders that could send are in `waiters`, scored by the
-- time since when they could. In `ready` they are scored for a periodic recheck, so that a loss of
-- the circuit's keys strands no sender. The first sender in `waiters` sends the next probe: a job
-- that failed is due later than one never tried. `waiters` of a closed circuit may be stale: they
-- must be ignored.

-- ms between two rechecks of a sender in `waiters`.
local RECHECK = 30000
-- ms for which a circuit is kept after its last change.
local KEEP = 3600000
-- Stands for the senders of an endpoint if the connections of several failed.
local SEVERAL = '*'
local circuits = {}

-- Returns the circuit that the users of an endpoint share, or nil.
local function shared_of(endpoint) return string.match(endpoint, '^(relay):') end

local function circuit(endpoint)
    local c = circuits[endpoint]
    if not c then
        local f = redis.call('HMGET', circuit_of(endpoint), 'failures', 'by', 'open', 'next',
            'probe', 'until', 'life')
        if f[7] and f[7] ~= LIFE then
            -- Its times may date from before a step of the clock.
            redis.call('DEL', circuit_of(endpoint))
            f = {}
        end
        c = {
            id = endpoint,
            failures = tonumber(f[1] or 0),
            -- The sender whose connections failed, or SEVERAL.
            by = f[2],
            open = f[3] and true,
            next = tonumber(f[4] or 0),
            -- The probe in flight, and when its lease expires.
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

-- Whether a circuit lets one more job through now.
local function admits(c) return not c.open or math.max(c.next, c.busy_until) <= NOW end

-- Whether one more job of the sender may be sent to its endpoint now.
local function admits_sender(s)
    return admits(circuit(s.endpoint)) and (not s.shared or admits(circuit(s.shared)))
end

-- Calls `step` with each circuit that the sender's mail needs.
local function each_circuit(s, step, ...)
    step(circuit(s.endpoint), s, ...)
    if s.shared then step(circuit(s.shared), s, ...) end
end

-- Schedules the longest-waiting sender in `waiters` for the time of the next probe.
local function schedule_prober(c)
    local first = redis.call('ZRANGE', waiters_of(c.id), 0, 0)[1]
    if first then redis.call('ZADD', READY, 'LT', math.max(c.next, c.busy_until), first) end
end

local function leave_waiters(c, id)
    if c.open and redis.call('ZREM', waiters_of(c.id), id) == 1 then schedule_prober(c) end
end

-- The sender waits for neither of its circuits: it was sent to another endpoint.
local function leave_all_waiters(s)
    each_circuit(s, function(c) leave_waiters(c, s.id) end)
end

-- Returns when to check a sender whose own limits allow a send from `at` on.
local function through_circuit(s, at)
    local closed
    local function pass(c)
        if not c.open then return end
        if at > NOW or closed or admits(c) then leave_waiters(c, s.id) else closed = c end
    end
    pass(circuit(s.endpoint))
    if s.shared then pass(circuit(s.shared)) end
    if not closed then return at end
    local waiters = waiters_of(closed.id)
    redis.call('ZADD', waiters, at, s.id)
    redis.call('PEXPIRE', waiters, KEEP + math.max(0, closed.next - NOW))
    if redis.call('ZRANGE', waiters, 0, 0)[1] ~= s.id then return NOW + RECHECK end
    return math.min(NOW + RECHECK, math.max(closed.next, closed.busy_until))
end

local function begin_probe_of(c, s, member, until_ms)
    if not c.open then return end
    c.probe, c.busy_until = s.id .. ' ' .. member, until_ms
    write_circuit(c, 'probe', c.probe, 'until', until_ms)
    redis.call('ZREM', waiters_of(c.id), s.id)
    -- In case the dispatcher that sends the probe dies.
    schedule_prober(c)
end

local function begin_probe(s, member, until_ms)
    if s.open then redis.call('HSET', settings_of(s.id), 'prober', member) end
    each_circuit(s, begin_probe_of, member, until_ms)
end

-- Moves the end of a probe whose lease was renewed. Not in a shared circuit: there the mail of one
-- user, which may be slow by itself, holds back the next probe for one lease and no longer.
local function extend_probe(s, member, until_ms)
    local c = circuit(s.endpoint)
    if c.probe ~= s.id .. ' ' .. member then return end
    c.busy_until = until_ms
    write_circuit(c, 'until', until_ms)
end
