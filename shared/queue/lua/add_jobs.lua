-- Adds jobs that were just committed to the heads of senders that Redis knows.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV[2] most     jobs of a head; those due later are left to a load
-- ARGV    then, for each sender, two values: its id, and its jobs as member, due ms, with spaces
--         between the values
-- Returns the life of the shard, and then the senders that Redis does not know: load their heads
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include look

local window, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local answer = { LIFE }

local function add_jobs(s, jobs)
    local due, leases, settings = due_of(s.id), lease_of(s.id), settings_of(s.id)
    for member, at in string.gmatch(jobs, '(%S+) (%S+)') do
        -- A load may have read the job already, and a dispatcher may have claimed it.
        if tonumber(at) <= s.horizon and not redis.call('ZSCORE', leases, member) then
            redis.call('ZADD', due, at, member)
        end
    end
    local beyond = redis.call('ZCARD', due) - most
    if beyond > 0 then
        redis.call('ZREMRANGEBYRANK', due, -beyond, -1)
        local last = redis.call('ZRANGE', due, -1, -1, 'WITHSCORES')
        s.horizon = tonumber(last[2])
        redis.call('HSET', settings, 'horizon', last[2])
    end
    redis.call('PERSIST', settings)
    redis.call('PERSIST', window_of(s.id))
    schedule_look(s, window)
end

for i = 3, #ARGV, 2 do
    local s = read_sender(ARGV[i], true)
    if s then
        -- A load that read PostgreSQL before the commit must not remove them.
        redis.call('HINCRBY', settings_of(s.id), 'epoch', 1)
        add_jobs(s, ARGV[i + 1])
    else
        answer[#answer + 1] = ARGV[i]
    end
end
wake_sleepers()
return answer
