-- Replaces the head of one sender by what PostgreSQL said. Where Redis does not know the sender,
-- its limiter's history is restored as well.
--
-- KEYS[1] ready
-- ARGV[1] sender
-- ARGV[2] epoch    as begin_load returned it
-- ARGV[3] window   ms of the trailing window
-- ARGV[4] limit, ARGV[5] gap (ms), ARGV[6] flight, ARGV[7] state (1 active)
-- ARGV[8] horizon  due ms of the last job loaded, or 'inf' if no more wait
-- ARGV[9] endpoint that its mail goes to, ARGV[10] revision of the sender
-- ARGV[11] jobs    of the head, each as member, due ms
-- ARGV[12] ends    each as member, ms since it ended, 1 if it takes a slot
-- ARGV[13] leases  each as member, ms left
-- Those three are words between spaces: one argument costs the caller as much as 50 words.
-- ARGV[14], ARGV[15]  the present or next opening of its sending hours (ms; 0 and 'inf': always)
-- ARGV[16] cooldown  ms until the next probe, at least 1; 0: the sender does not cool down
--
-- Returns changes of circuits (circuit.lua), or nil if the epoch has moved: somebody committed or
-- lost something meanwhile; the caller reads PostgreSQL again.
--!include keys
--!include time
--!include run
--!include life
--!include epoch
--!include circuit
--!include look

-- ms until a load that brought nothing is asked for again.
local SOON = 100
local id, window, horizon = ARGV[1], tonumber(ARGV[3]), ARGV[8]
local settings = settings_of(id)
if epoch_of(id) ~= ARGV[2] then return nil end

-- In parts, for Lua's stack is short.
local function add_all(key, scores)
    for i = 1, #scores, 1000 do
        redis.call('ZADD', key, unpack(scores, i, math.min(i + 999, #scores)))
    end
end

-- Returns whether a job was left out, since it is claimed.
local function replace_head()
    local due, leases, scores, left_out = due_of(id), lease_of(id), {}, false
    redis.call('DEL', due)
    local leased = redis.call('EXISTS', leases) == 1
    for member, at in string.gmatch(ARGV[11], '(%S+) (%S+)') do
        -- A leased one is claimed, and was not yet marked in PostgreSQL when that was read.
        if leased and redis.call('ZSCORE', leases, member) then
            left_out = true
        else
            scores[#scores + 1] = at
            scores[#scores + 1] = member
        end
    end
    add_all(due, scores)
    return left_out
end

if is_new(ARGV[2]) then
    redis.call('DEL', due_of(id), lease_of(id), window_of(id), settings)
    redis.call('HSET', settings, 'epoch', string.format('%.0f', NOW * 1000), 'life', LIFE)
    local last_end, ends, leases = 0, {}, {}
    for member, age, counted in string.gmatch(ARGV[12], '(%S+) (%S+) (%S+)') do
        local ended = NOW_UP - tonumber(age)
        if counted == '1' then
            ends[#ends + 1] = ended
            ends[#ends + 1] = member
        end
        last_end = math.max(last_end, ended)
    end
    add_all(window_of(id), ends)
    for member, left in string.gmatch(ARGV[13], '(%S+) (%S+)') do
        leases[#leases + 1] = NOW_UP + tonumber(left)
        leases[#leases + 1] = member
    end
    add_all(lease_of(id), leases)
    redis.call('HSET', settings, 'end', last_end)
end
local before = read_sender(id)
if before and (before.endpoint ~= ARGV[9]
    or redis.call('HGET', settings, 'revision') ~= ARGV[10]) then
    -- Another endpoint, or a right password now: what is known says nothing of that.
    forget_troubles(before)
    leave_held(circuit(before.endpoint), id)
    redis.call('HDEL', settings, 'pace')
end
if replace_head() then
    -- Should its claim come to nothing, see settle.lua.
    redis.call('HSET', settings, 'left', 1)
else
    redis.call('HDEL', settings, 'left')
end
redis.call('HSET', settings, 'limit', ARGV[4], 'gap', ARGV[5], 'flight', ARGV[6], 'state', ARGV[7],
    'horizon', horizon, 'parts', parts_of(id), 'endpoint', ARGV[9], 'revision', ARGV[10],
    'opens', ARGV[14], 'closes', ARGV[15])
if ARGV[16] == '0' then
    redis.call('HDEL', settings, 'cool')
else
    redis.call('HSET', settings, 'cool', NOW_UP + tonumber(ARGV[16]))
end
if horizon ~= 'inf' and redis.call('EXISTS', due_of(id)) == 0 then
    -- All that was read is under lease and not yet marked in PostgreSQL; more waits behind it.
    redis.call('HSET', settings, 'loading', NOW + SOON)
else
    redis.call('HDEL', settings, 'loading')
end
redis.call('PERSIST', settings)
redis.call('PERSIST', window_of(id))
schedule_look(read_sender(id), window)
wake_sleepers()
return changes
