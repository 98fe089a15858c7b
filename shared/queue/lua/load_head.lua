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
-- ARGV[11] n       jobs that follow, as member, due ms
-- ARGV    then m, the ends that follow, as member, ms since it ended, 1 if it takes a slot
-- ARGV    then k, the leases that follow, as member, ms left
--
-- Returns 1, or 0 if the epoch has moved: somebody committed or lost something meanwhile; the
-- caller reads PostgreSQL again.
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
if epoch_of(id) ~= ARGV[2] then return 0 end

local position = 11
local function next_arg()
    local value = ARGV[position]
    position = position + 1
    return value
end

local function replace_head()
    local due, leases = due_of(id), lease_of(id)
    redis.call('DEL', due)
    for _ = 1, tonumber(next_arg()) do
        local member, at = next_arg(), next_arg()
        -- Claimed, and not yet marked in PostgreSQL when it was read.
        if not redis.call('ZSCORE', leases, member) then redis.call('ZADD', due, at, member) end
    end
end

if is_new(ARGV[2]) then
    redis.call('DEL', due_of(id), lease_of(id), window_of(id), settings)
    redis.call('HSET', settings, 'epoch', string.format('%.0f', NOW * 1000), 'life', LIFE)
    local jobs = tonumber(ARGV[11])
    position = 12 + jobs * 2
    local last_end = 0
    for _ = 1, tonumber(next_arg()) do
        local member, ended, counted = next_arg(), NOW_UP - tonumber(next_arg()), next_arg()
        if counted == '1' then redis.call('ZADD', window_of(id), ended, member) end
        last_end = math.max(last_end, ended)
    end
    for _ = 1, tonumber(next_arg()) do
        local member, left = next_arg(), tonumber(next_arg())
        redis.call('ZADD', lease_of(id), NOW_UP + left, member)
    end
    redis.call('HSET', settings, 'end', last_end)
    position = 11
end
local before = read_sender(id)
if before and (before.endpoint ~= ARGV[9]
    or redis.call('HGET', settings, 'revision') ~= ARGV[10]) then
    -- Another endpoint, or a right password now: what is known says nothing of that.
    forget_troubles(before)
    leave_held(circuit(before.endpoint), id)
end
replace_head()
redis.call('HSET', settings, 'limit', ARGV[4], 'gap', ARGV[5], 'flight', ARGV[6], 'state', ARGV[7],
    'horizon', horizon, 'parts', parts_of(id), 'endpoint', ARGV[9], 'revision', ARGV[10])
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
return 1
