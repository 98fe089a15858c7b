-- Restores the history of a limiter, a sender's or a user's, that Redis had lost. See load_head.lua
-- for the texts `ends` and `leases`.

-- Adds the scores in parts, because Lua's stack is small.
local function add_all(key, scores)
    for i = 1, #scores, 1000 do
        redis.call('ZADD', key, unpack(scores, i, math.min(i + 999, #scores)))
    end
end

-- Returns the leases as text, each as member, score.
local function restore_history(id, ends, leases)
    local settings = settings_of(id)
    redis.call('DEL', due_of(id), lease_of(id), window_of(id), settings)
    redis.call('HSET', settings, 'epoch', string.format('%.0f', NOW * 1000), 'life', LIFE)
    local last_end, ended_at, until_ms, restored = 0, {}, {}, {}
    for member, age, counted in string.gmatch(ends, '(%S+) (%S+) (%S+)') do
        local ended = NOW_UP - tonumber(age)
        if counted == '1' then
            ended_at[#ended_at + 1] = ended
            ended_at[#ended_at + 1] = member
        end
        last_end = math.max(last_end, ended)
    end
    add_all(window_of(id), ended_at)
    for member, left in string.gmatch(leases, '(%S+) (%S+)') do
        local deadline = NOW_UP + tonumber(left)
        until_ms[#until_ms + 1] = deadline
        until_ms[#until_ms + 1] = member
        restored[#restored + 1] = member .. ' ' .. string.format('%.0f', deadline)
    end
    add_all(lease_of(id), until_ms)
    redis.call('HSET', settings, 'end', last_end)
    return table.concat(restored, ' ')
end
