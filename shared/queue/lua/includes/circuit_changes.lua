-- Opens and closes circuits (circuit.lua): what the end of a send says about its endpoint.

local FAILURES = 3
-- The circuits that this run of the script opened or closed; only its caller reports them. Each as
-- 'opened' or 'closed', the sender or '' (the endpoint's), open since (ms), reason.
local changes = {}

-- `lease` is set for a claim that was not used: it must not end the probe of a later claim.
local function end_probe_of(c, s, member, lease)
    if c.probe ~= s.id .. ' ' .. member or (lease and lease ~= c.busy_until) then return end
    c.busy_until, c.ended = 0, c.probe
    redis.call('HDEL', circuit_of(c.id), 'probe', 'until')
    c.probe = false
    schedule_prober(c)
end

local function end_probe(s, member, lease) each_circuit(s, end_probe_of, member, lease) end

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
    redis.call('HDEL', settings_of(s.id), 'troubles', 'open', 'probe', 'step', 'prober', 'reason')
    s.troubles, s.open, s.probe = 0, false, 0
end

-- The endpoint replied: all senders in `waiters` may send again, within their own limits.
local function close(c)
    if c.failures == 0 then return end
    if c.open then
        has_closed(circuit_of(c.id), '')
        local waiters = redis.call('ZRANGE', waiters_of(c.id), 0, -1, 'WITHSCORES')
        for i = 1, #waiters, 2 do redis.call('ZADD', READY, 'LT', waiters[i + 1], waiters[i]) end
    end
    redis.call('DEL', circuit_of(c.id), waiters_of(c.id))
    circuits[c.id] = nil
end

local function answered(s)
    forget_troubles(s)
    each_circuit(s, close)
end

local function wait_of(backoff, number)
    local wait
    for ms in string.gmatch(backoff, '%d+') do
        wait = tonumber(ms)
        number = number - 1
        if number == 0 then break end
    end
    return wait
end

-- A probe failed: the next one waits longer.
local function postpone_probe(c, reason, backoff)
    c.next = NOW + wait_of(backoff, redis.call('HINCRBY', circuit_of(c.id), 'step', 1))
    write_circuit(c, 'next', c.next, 'reason', reason)
    schedule_prober(c)
end

-- Returns the circuit that a failure counts for. A send that was in flight when a circuit opened
-- is not a probe: it changes nothing of an open circuit.
local function blame(s, member, reason, backoff, before_mail)
    local own = circuit(s.endpoint)
    local shared = s.shared and circuit(s.shared)
    local ended = s.id .. ' ' .. member
    if own.open and own.ended == ended then postpone_probe(own, reason, backoff) end
    if shared and shared.open and shared.ended == ended then
        -- With MAIL, the probe was in a session, so the relay replies.
        if before_mail then postpone_probe(shared, reason, backoff) else close(shared) end
    end
    return shared and before_mail and shared or own
end

-- The connection of this attempt failed. If that opens the endpoint's circuit, returns the sender
-- that the failures were counted for so far, if it was only one: they are the endpoint's now.
local function failed(s, member, reason, backoff, before_mail)
    local settings = settings_of(s.id)
    if s.open and redis.call('HGET', settings, 'prober') == member then
        local step = redis.call('HINCRBY', settings, 'step', 1)
        s.probe = NOW + wait_of(backoff, step)
        redis.call('HSET', settings, 'probe', s.probe, 'reason', reason)
    end
    local c = blame(s, member, reason, backoff, before_mail)
    if c.open then return nil end
    if s.open then
        -- Failures of a sender whose own circuit is open do not open the endpoint's circuit.
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
        c.open, c.next = true, NOW + wait_of(backoff, 1)
        redis.call('DEL', waiters_of(c.id))
        write_circuit(c, 'open', NOW, 'next', c.next, 'step', 1)
        has_opened('', reason)
        forget_troubles(s)
        return before ~= SEVERAL and before or nil
    elseif s.troubles >= FAILURES then
        s.open, s.probe = true, NOW + wait_of(backoff, 1)
        redis.call('HSET', settings, 'open', NOW, 'probe', s.probe, 'step', 1)
        has_opened(s.id, reason)
    end
    return nil
end
