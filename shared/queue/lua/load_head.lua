-- Replaces the head of one sender with the jobs read from PostgreSQL. If Redis does not know the
-- sender, the history of its limiter is restored as well.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV[2] epoch    as begin_load returned it
-- ARGV[3] head     a map (cmsgpack):
--   sender, limit, gap (ms), flight, state (1 active)
--   horizon        due ms of the last job loaded, or 'inf' if no more wait
--   user           key of the user who owns it
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

-- ms until a load that brought nothing is requested again.
local SOON = 100
local window, epoch, head = tonumber(ARGV[1]), ARGV[2], cmsgpack.unpack(ARGV[3])
local id, settings = head.sender, settings_of(head.sender)
if epoch_of(id) ~= epoch then return nil end

-- Adds the scores in parts, because Lua's stack is small.
local function add_all(key, scores)
    for i = 1, #scores, 1000 do
        redis.call('ZADD', key, unpack(scores, i, math.min(i + 999, #scores)))
    end
end

-- Returns whether a job was left out because it is claimed.
local function replace_head()
    local due, leases, scores, left_out = due_of(id), lease_of(id), {}, false
    redis.call('DEL', due)
    local leased = redis.call('EXISTS', leases) == 1
    local known = {}
    local texts = redis.call('HGET', settings, 'restored') or ''
    for member, at in string.gmatch(texts, '(%S+) (%S+)') do
        known[member] = tonumber(at)
    end
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

-- The leases of a history, each as member, score.
local restored = {}
if is_new(epoch) then
    redis.call('DEL', due_of(id), lease_of(id), window_of(id), settings)
    redis.call('HSET', settings, 'epoch', string.format('%.0f', NOW * 1000), 'life', LIFE)
    local last_end, ends, leases = 0, {}, {}
    for member, age, counted in string.gmatch(head.ends, '(%S+) (%S+) (%S+)') do
        local ended = NOW_UP - tonumber(age)
        if counted == '1' then
            ends[#ends + 1] = ended
            ends[#ends + 1] = member
        end
        last_end = math.max(last_end, ended)
    end
    add_all(window_of(id), ends)
    for member, left in string.gmatch(head.leases, '(%S+) (%S+)') do
        leases[#leases + 1] = NOW_UP + tonumber(left)
        leases[#leases + 1] = member
    end
    add_all(lease_of(id), leases)
    redis.call('HSET', settings, 'end', last_end)
    for i = 1, #leases, 2 do
        restored[#restored + 1] = leases[i + 1] .. ' ' .. string.format('%.0f', leases[i])
    end
end
local before = read_sender(id)
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
if #restored > 0 then
    redis.call('HSET', settings, 'restored', table.concat(restored, ' '))
end
redis.call('HSET', settings, 'limit', head.limit, 'gap', head.gap, 'flight', head.flight,
    'state', head.state, 'horizon', head.horizon, 'sets', sets_of(id),
    'user', head.user, 'endpoint', head.endpoint, 'revision', head.revision,
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
schedule_look(read_sender(id), window)
wake_sleepers()
return changes
