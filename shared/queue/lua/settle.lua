-- Ends claims: turns each lease into a used entry of the window, or frees the entry.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV[2] backoff  ms before the first, second, ... probe of an open circuit, comma-separated;
--                  the last repeats
-- ARGV[3] backoff  the same, for failed authentications
-- ARGV    then, for each claim, a map (cmsgpack) of sender, member, key of the user and
--   kind         COUNTED (its body was begun: takes an entry), BEGUN (SMTP was tried, no body: only
--                the gap counts) or UNUSED (SMTP was not tried)
--   age          ms since the send ended, measured by the caller's monotonic clock
--   lease        if UNUSED: when its lease expires, as returned by claim.lua
--   next_member  nil, or the job's next attempt, with its due time (ms) in next_due
--   contact      how the endpoint reacted: '' not contacted; 'OK' it replied; 'SENT' it accepted a
--                mail; 'RATE' it replied that mail comes too fast; '!' and the reason: the
--                connection failed; '?' and the reason: authentication failed
--   before_mail  whether the connection failed before MAIL, so that no mail can be the cause
--   cooldown     nil no change; 0 the sender's cooldown is over; else ms from now until its next
--                probe may begin
--
-- Returns {senders, changes}:
--   senders  whose head must be loaded (Redis does not know them any more)
--   changes  of circuits (circuit.lua), each with the index (from 0) of the claim that caused it
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include circuit_changes
--!include limits
--!include sender
--!include look
--!include pace
--!include restored

local window = tonumber(ARGV[1])
local backoffs = { ['!'] = ARGV[2], ['?'] = ARGV[3] }
local touched, order, unknown, owners = {}, {}, {}, {}
local reported = 0

local function sender_of(id)
    local s = touched[id]
    if s == nil then
        s = read_sender(id, true) or false
        touched[id] = s
        order[#order + 1] = id
    end
    return s
end

-- Frees a lease or an entry. With `lease` (of an UNUSED claim), only if it ends with that lease:
-- the same attempt may have been claimed again after a loss of Redis or an expired lease.
local function release(key, member, lease)
    if not lease or tonumber(redis.call('ZSCORE', key, member) or 0) == lease then
        redis.call('ZREM', key, member)
    end
end

-- Turns the lease of a claim on the limits of a sender or a user into an entry, or frees it.
local function end_use(s, claim, lease)
    local member, ended = claim.member, NOW_UP - claim.age
    release(lease_of(s.id), member, lease)
    if lease and s.restored then release(lease_of(s.id), member, s.restored[member] or -1) end
    -- If the lease had expired, its entry was assumed to be used; now the holder reports it.
    release(window_of(s.id), assumed(member), lease)
    if claim.kind == 'COUNTED' then redis.call('ZADD', window_of(s.id), ended, member) end
    if claim.kind ~= 'UNUSED' and ended > s.last_end then
        s.last_end = ended
        redis.call('HSET', settings_of(s.id), 'end', ended)
    end
end

-- Applies a contact to the circuit of the endpoint and to the pace of the sender.
local function apply_contact(s, member, contact, before_mail)
    local backoff = backoffs[string.sub(contact, 1, 1)]
    if backoff then
        local cleared = failed(s, member, string.sub(contact, 2), backoff, before_mail)
        if cleared and read_sender(cleared, true) then forget_troubles(sender_of(cleared)) end
    elseif contact ~= '' then
        answered(s)
        if contact == 'SENT' then speed_up(s) end
        if contact == 'RATE' then slow_down(s) end
    end
end

local function set_cooldown(s, ms)
    if not ms then return end
    s.cool = ms == 0 and 0 or NOW_UP + ms
    redis.call('HSET', settings_of(s.id), 'cool', s.cool)
    -- A load that read PostgreSQL before this must not undo it.
    redis.call('HINCRBY', settings_of(s.id), 'epoch', 1)
end

for i = 4, #ARGV do
    local claim = cmsgpack.unpack(ARGV[i])
    local id, member, kind = claim.sender, claim.member, claim.kind
    local s = sender_of(id)
    local lease = kind == 'UNUSED' and claim.lease
    local owner = read_user(claim.user)
    if owner == LOST then
        -- A load of the limiter may have read PostgreSQL before this.
        redis.call('HINCRBY', settings_of(limiter_of(claim.user)), 'epoch', 1)
    elseif owner then
        -- Leases that the load of the limiter brought. A claim that was given back after PostgreSQL
        -- was read does not know its own. A load of its sender ends that of the sender.
        owner.restored = owner.restored or restored_leases(owner.id)
        owners[owner.id] = owner
        end_use(owner, claim, lease)
    end
    if s then
        end_use(s, claim, lease)
        end_probe(s, member, lease)
        apply_contact(s, member, claim.contact, claim.before_mail)
        set_cooldown(s, claim.cooldown)
        for n = reported + 1, #changes do changes[n][5] = i - 4 end
        reported = #changes
        if claim.next_member then
            -- A load that read PostgreSQL before this must not remove it.
            redis.call('HINCRBY', settings_of(id), 'epoch', 1)
            redis.call('PERSIST', settings_of(id))
            redis.call('PERSIST', window_of(id))
            local leased = redis.call('ZSCORE', lease_of(id), claim.next_member)
            if not leased and claim.next_due <= s.horizon then
                redis.call('ZADD', due_of(id), claim.next_due, claim.next_member)
            end
        elseif kind == 'UNUSED' and redis.call('HGET', settings_of(id), 'left') then
            -- Its mark was refused, as in a pause, and a load left out the claimed job: load again.
            s.loading = NOW
            redis.call('HSET', settings_of(id), 'loading', NOW)
        end
    end
end

for _, id in ipairs(order) do
    if touched[id] then
        schedule_look(touched[id], window)
    else
        unknown[#unknown + 1] = id
    end
end
for _, owner in pairs(owners) do schedule_user(owner, window) end
wake_sleepers()
return { unknown, changes }
