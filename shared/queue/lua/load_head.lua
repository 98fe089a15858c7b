-- Replaces the heads of senders with the jobs read from PostgreSQL. If Redis does not know a
-- sender, the history of its limiter is restored as well.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV    then, for each sender, two values:
--   its epoch      as begin_load returned it
--   its head       a map (cmsgpack) of what follows
--   sender, limit, gap (ms), flight, state (1 active)
--   horizon        due ms of the last job loaded, or 'inf' if no more wait
--   user           key of the user who owns it, or ''
--   limited        whether that user has limits of its own (load_user.lua)
--   endpoint       key of the endpoint that its mail goes to (circuit_keys.py)
--   revision       of the sender, as text
--   jobs           of the head, each as member, due ms
--   ends           each as member, ms since it ended, 1 if it takes an entry
--   leases         each as member, ms left
--                  These three are texts with spaces between the values, the cheapest for callers.
--   opens, closes  the current or next opening of its sending hours (ms; 0 and 'inf': always)
--   cooldown       ms until the next probe, at least 1; nil: the sender does not cool down
--   paused         when the sender's pause ends by itself (ms; 0: no such pause)
--   wake           ms until the next load, because the pause of a batch ends; nil: none
--
-- Returns {refused, changes}:
--   refused  senders whose epoch has changed, because something was committed or lost meanwhile:
--            the caller reads PostgreSQL again
--   changes  of circuits (circuit.lua)
--!include keys
--!include time
--!include run
--!include life
--!include epoch
--!include circuit
--!include circuit_changes
--!include limits
--!include sender
--!include look
--!include history
--!include restored

-- ms until a load that brought nothing is requested again.
local SOON = 100
local window = tonumber(ARGV[1])

-- Returns whether a job was left out because it is claimed.
local function replace_jobs(id, jobs, is_fresh)
    local due, leases, scores, left_out = due_of(id), lease_of(id), {}, false
    if not is_fresh then redis.call('DEL', due) end
    local leased = redis.call('EXISTS', leases) == 1
    local known = leased and restored_leases(id)
    for member, at in string.gmatch(jobs, '(%S+) (%S+)') do
        local lease = leased and redis.call('ZSCORE', leases, member)
        if lease and tonumber(lease) == known[member] then
            -- The dispatcher that had marked it gave it back after PostgreSQL was read for the
            -- history. It does not know this lease, so nothing else would end it.
            redis.call('ZREM', leases, member)
            lease = false
        end
        if lease then
            -- A job with a lease was claimed, but not yet marked when PostgreSQL was read.
            left_out = true
        else
            scores[#scores + 1] = at
            scores[#scores + 1] = member
        end
    end
    add_all(due, scores)
    return left_out
end

local function load_head(epoch, head)
    local id, settings = head.sender, settings_of(head.sender)
    -- A new sender has only its history so far, so there is nothing to compare or to remove.
    local is_fresh = is_new(epoch)
    local restored = is_fresh and restore_history(id, head.ends, head.leases) or ''
    if not needs_limiter(head.limited) then forget_user(head.user) end
    local before = not is_fresh and read_sender(id, true)
    if before and (before.endpoint ~= head.endpoint
        or redis.call('HGET', settings, 'revision') ~= head.revision) then
        -- The endpoint or its password changed, so the old failures and pace no longer apply.
        forget_troubles(before)
        leave_all_waiters(before)
        redis.call('HDEL', settings, 'pace')
    end
    local fields = { 'limit', head.limit, 'gap', head.gap, 'flight', head.flight,
        'state', head.state, 'horizon', head.horizon, 'user', head.user,
        'limited', head.limited and 1 or 0, 'endpoint', head.endpoint,
        'revision', head.revision, 'opens', head.opens, 'closes', head.closes,
        'paused', head.paused or 0 }
    local function set(name, value)
        fields[#fields + 1] = name
        fields[#fields + 1] = value
    end
    local gone = { 'refused' }
    -- settle.lua reads `left` if the claim is not used.
    if replace_jobs(id, head.jobs, is_fresh) then set('left', 1) else gone[#gone + 1] = 'left' end
    if restored ~= '' then set('restored', restored) end
    if head.cooldown then
        set('cool', NOW_UP + head.cooldown)
    else
        gone[#gone + 1] = 'cool'
    end
    if head.wake then set('wake', NOW_UP + head.wake) else gone[#gone + 1] = 'wake' end
    if head.horizon ~= 'inf' and redis.call('EXISTS', due_of(id)) == 0 then
        -- All jobs read are claimed and not yet marked in PostgreSQL; more jobs wait behind them.
        set('loading', NOW + SOON)
    else
        gone[#gone + 1] = 'loading'
    end
    set('sets', sets_of(id))
    redis.call('HSET', settings, unpack(fields))
    if not is_fresh then
        redis.call('HDEL', settings, unpack(gone))
        redis.call('PERSIST', settings)
        redis.call('PERSIST', window_of(id))
    end
    schedule_look(read_sender(id, true), window)
end

local refused = {}
for i = 2, #ARGV, 2 do
    local epoch, head = ARGV[i], cmsgpack.unpack(ARGV[i + 1])
    if epoch_of(head.sender) == epoch then
        load_head(epoch, head)
    else
        refused[#refused + 1] = head.sender
        note_refusal(head.sender)
    end
end
wake_sleepers()
return { refused, changes }
