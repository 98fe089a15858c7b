-- The life of a shard: what was loaded in another life is not believed, and is loaded anew.
-- A life ends with the server's process, for what a snapshot or a replica has of leases and ends
-- may be old; with a step back of the server's clock by a second or more, for the ends then lie in
-- its future; and with this key. A smaller step back: the time stands still until it is made up.

local LIFE_KEY = prefix .. 'life'
local STEP = 1000
local LIFE
-- Whether Redis takes no more memory (noeviction). What ends or moves claims goes on, for that
-- frees memory; a sender that it does not know must wait.
local FULL = false
do
    local f = redis.call('HMGET', LIFE_KEY, 'run', 'id', 'seen')
    local seen = tonumber(f[3] or 0)
    LIFE = f[2]
    if f[1] ~= RUN or NOW <= seen - STEP then
        LIFE = string.sub(RUN, 1, 8) .. string.format(':%.0f', NOW)
    else
        NOW, NOW_UP = math.max(NOW, seen), math.max(NOW_UP, seen)
    end
    local kept = redis.pcall('HSET', LIFE_KEY, 'run', RUN, 'id', LIFE, 'seen', NOW)
    if type(kept) == 'table' and kept.err then
        FULL = true
        -- Once a script has written, Redis refuses it no more memory: it cannot be stopped half
        -- way. A deletion is a write that is never refused.
        redis.call('HDEL', LIFE_KEY, '')
        redis.call('HSET', LIFE_KEY, 'run', RUN, 'id', LIFE, 'seen', NOW)
    end
end

-- How many of a sender's sorted sets there are. Its settings say how many there must be, so that
-- the loss of any one of them is noticed.
local function parts_of(sender)
    return redis.call('EXISTS', due_of(sender), lease_of(sender), window_of(sender))
end

-- Whether what Redis holds of a sender is whole and of this life, given its settings' fields.
local function is_known(sender, limit, life, parts)
    return limit and life == LIFE and tonumber(parts) == parts_of(sender)
end
