-- Ends claims: turns each lease into its slot of the window, or gives the slot back.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV    then, for each claim: sender, member, kind, age, next member, next due
--   kind         COUNTED (its body was begun: takes a slot), BEGUN (SMTP was tried, no body: only
--                the gap counts) or UNUSED (SMTP never heard of it)
--   age          ms since the send ended, measured by the caller's monotonic clock
--   next member  '' or the job's next attempt, with its due time in ms
--
-- Returns the senders whose head must be loaded (Redis knows them no more).
--!include keys
--!include time
--!include look

local window = tonumber(ARGV[1])
local touched, order, unknown = {}, {}, {}

local function sender_of(id)
    local s = touched[id]
    if s == nil then
        s = read_sender(id) or false
        touched[id] = s
        order[#order + 1] = id
    end
    return s
end

for i = 2, #ARGV, 6 do
    local id, member, kind = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    local s = sender_of(id)
    if s then
        local ended = NOW_UP - tonumber(ARGV[i + 3])
        -- The lease had run out, so the slot was assumed to be used; now its holder says what is.
        local late = redis.call('ZREM', window_of(id), assumed(member)) == 1
        -- Late, and it did not even begin: then the lease is that of a later claim, which stays.
        if not (late and kind == 'UNUSED') then redis.call('ZREM', lease_of(id), member) end
        if kind == 'COUNTED' then redis.call('ZADD', window_of(id), ended, member) end
        if kind ~= 'UNUSED' and ended > s.last_end then
            s.last_end = ended
            redis.call('HSET', settings_of(id), 'end', ended)
        end
        if ARGV[i + 4] ~= '' then
            -- A load that read PostgreSQL before this must not wipe it out.
            redis.call('HINCRBY', settings_of(id), 'epoch', 1)
            redis.call('PERSIST', settings_of(id))
            redis.call('PERSIST', window_of(id))
            local leased = redis.call('ZSCORE', lease_of(id), ARGV[i + 4])
            if not leased and tonumber(ARGV[i + 5]) <= s.horizon then
                redis.call('ZADD', due_of(id), ARGV[i + 5], ARGV[i + 4])
            end
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
wake_sleepers()
return unknown
