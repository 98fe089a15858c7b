-- Replaces the head of one sender with the jobs read from PostgreSQL. If Redis does not know the
-- sender, the history of its limiter is restored as well.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV[2] epoch    as begin_load returned it
-- ARGV[3] head     a map (cmsgpack):
--   sender, limit, gap (ms), flight, state (1 active)
--   horizon        due ms of the last job loaded, or 'inf' if no more wait
--   user           key of the user who owns it, or ''
--   limited        whether that user has limits that were set for it alone (load_user.lua)
--   endpoint       key of the endpoint that its mail goes to (circuit_keys.py)
--   revision       of the sender, as text
--   jobs           of the head, each as member, due ms
--   ends           each as member, ms since it ended, 1 if it takes an entry
--   leases         each as member, ms left
--                  These three are texts with spaces between the values, the cheapest for callers.
--   opens, closes  the current or next opening of its sending hours (ms; 0 and 'inf': always)
--   cooldown       ms until the next probe, at least 1; nil: the sender does not cool down
--
-- Returns changes of circuits (circuit.lua), or nil if the epoch has changed, because something was
-- committed or lost meanwhile: the caller reads PostgreSQL again.
--!include keys
--!include time
--!include run
--!include life
--!include epoch
--!include circuit
--!include look
--!include history
--!include restored

-- ms until a load that brought nothing is requested again.
local SOON = 100
local window, epoch, head = tonumber(ARGV[1]), ARGV[2], cmsgpack.unpack(ARGV[3])
local id, settings = head.sender, settings_of(head.sender)
if epoch_of(id) ~= epoch then return nil end

-- Returns whether a job was left out because it is claimed.
local function replace_head()
    local due, leases, scores, left_out = due_of(id), lease_of(id), {}, false
    redis.call('DEL', due)
    local leased = redis.call('EXISTS', leases) == 1
    local known = restored_leases(id)
    for member, at in string.gmatch(head.jobs, '(%S+) (%S+)') do
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

local restored = is_new(epoch) and restore_history(id, head.ends, head.leases) or ''
if not needs_limiter(head.limited) then forget_user(head.user) end
local before = read_sender(id, true)
if before and (before.endpoint ~= head.endpoint
    or redis.call('HGET', settings, 'revision') ~= head.revision) then
    -- The endpoint or its password changed, so the old failures and pace no longer apply.
    forget_troubles(before)
    leave_all_waiters(before)
    redis.call('HDEL', settings, 'pace')
end
if replace_head() then
    -- settle.lua reads this if the claim is not used.
    redis.call('HSET', settings, 'left', 1)
else
    redis.call('HDEL', settings, 'left')
end
if restored ~= '' then redis.call('HSET', settings, 'restored', restored) end
redis.call('HSET', settings, 'limit', head.limit, 'gap', head.gap, 'flight', head.flight,
    'state', head.state, 'horizon', head.horizon, 'sets', sets_of(id),
    'user', head.user, 'limited', head.limited and 1 or 0,
    'endpoint', head.endpoint, 'revision', head.revision,
    'opens', head.opens, 'closes', head.closes)
if head.cooldown then
    redis.call('HSET', settings, 'cool', NOW_UP + head.cooldown)
else
    redis.call('HDEL', settings, 'cool')
end
if head.horizon ~= 'inf' and redis.call('EXISTS', due_of(id)) == 0 then
    -- All jobs read are claimed and not yet marked in PostgreSQL; more jobs wait behind them.
    redis.call('HSET', settings, 'loading', NOW + SOON)
else
    redis.call('HDEL', settings, 'loading')
end
redis.call('PERSIST', settings)
redis.call('PERSIST', window_of(id))
schedule_look(read_sender(id, true), window)
wake_sleepers()
return changes
