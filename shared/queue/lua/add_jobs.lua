-- Adds jobs that were just committed to the heads of senders that Redis knows.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV[2] most     jobs of a head; those due later are left to a load
-- ARGV    then, for each sender, two values: its id, and its jobs as member, due ms, with spaces
--         between the values
-- Returns the life of the shard, and then the senders whose heads must be loaded instead, because
-- - Redis does not know them;
-- - they may not send: jobs of a deleted sender would stay here;
-- - a load of theirs was refused and is being repeated (load_head.lua). Additions, which bring
--   neither settings nor later jobs, could make it be refused again and again.
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include limits
--!include sender
--!include look

local window, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local answer = { LIFE }

local function is_open(s)
    return s and s.active and not redis.call('HGET', settings_of(s.id), 'refused')
end

-- Removes the last job, and returns when the one before it is due.
local function remove_last(due)
    redis.call('ZREM', due, redis.call('ZRANGE', due, -1, -1)[1])
    return tonumber(redis.call('ZRANGE', due, -1, -1, 'WITHSCORES')[2])
end

local function add_jobs(s, jobs)
    local due, leases, settings = due_of(s.id), lease_of(s.id), settings_of(s.id)
    local horizon, size = s.horizon, redis.call('ZCARD', due)
    for member, at in string.gmatch(jobs, '(%S+) (%S+)') do
        -- A load may have read the job already, and a dispatcher may have claimed it.
        if tonumber(at) <= horizon and not redis.call('ZSCORE', leases, member) then
            size = size + redis.call('ZADD', due, at, member)
            -- Jobs are added one at a time, because Redis never turns a large set back into a
            -- compact one.
            while size > most do
                size, horizon = size - 1, remove_last(due)
            end
        end
    end
    if horizon ~= s.horizon then
        s.horizon = horizon
        redis.call('HSET', settings, 'horizon', string.format('%.0f', horizon))
    end
    redis.call('PERSIST', settings)
    redis.call('PERSIST', window_of(s.id))
    schedule_look(s, window)
end

for i = 3, #ARGV, 2 do
    local s = read_sender(ARGV[i], true)
    if is_open(s) then
        -- A load that read PostgreSQL before the commit must not remove them.
        redis.call('HINCRBY', settings_of(s.id), 'epoch', 1)
        add_jobs(s, ARGV[i + 1])
    else
        answer[#answer + 1] = ARGV[i]
    end
end
wake_sleepers()
return answer
