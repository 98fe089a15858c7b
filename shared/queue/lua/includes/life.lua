-- The life of a shard: data that was loaded in an earlier life is discarded and loaded again.
-- A life ends when
-- - the server's process ends: leases and ends in a snapshot or on a replica may be outdated;
-- - the server's clock steps back by a second or more: stored ends would lie in the future (after
--   a smaller step, NOW stands still until the clock has caught up);
-- - LIFE_KEY is lost.

local LIFE_KEY = prefix .. 'life'
local STEP = 1000
local LIFE
-- Whether Redis is out of memory (noeviction). Settling and renewing claims still works, because
-- it frees memory; no new sender is loaded.
local FULL = false
-- The limits of users that have none of their own: sends in a window and gap in ms, 0: none. They
-- are those of the dispatcher that claimed last.
local USER_LIMIT, USER_GAP = 0, 0
do
    local f = redis.call('HMGET', LIFE_KEY, 'run', 'id', 'seen', 'users')
    local seen = tonumber(f[3] or 0)
    LIFE = f[2]
    if f[1] ~= RUN or NOW <= seen - STEP then
        LIFE = string.sub(RUN, 1, 8) .. string.format(':%.0f', NOW)
    else
        NOW, NOW_UP = math.max(NOW, seen), math.max(NOW_UP, seen)
    end
    local limit, gap = string.match(f[4] or '', '^(%d+) (%d+)$')
    if limit then USER_LIMIT, USER_GAP = tonumber(limit), tonumber(gap) end
    local kept = redis.pcall('HSET', LIFE_KEY, 'run', RUN, 'id', LIFE, 'seen', NOW)
    if type(kept) == 'table' and kept.err then
        FULL = true
        -- Redis never refuses a deletion, and it refuses a script no memory after its first write,
        -- so that scripts do not stop half way.
        redis.call('HDEL', LIFE_KEY, '')
        redis.call('HSET', LIFE_KEY, 'run', RUN, 'id', LIFE, 'seen', NOW)
    end
end

-- Returns how many of a sender's sorted sets exist. Its settings store how many must exist, so
-- that the loss of one of them is noticed.
local function sets_of(sender)
    return redis.call('EXISTS', due_of(sender), lease_of(sender), window_of(sender))
end

-- Whether Redis has all data of a sender, from this life, given fields of the sender's settings.
local function is_known(sender, limit, life, sets)
    return limit and life == LIFE and tonumber(sets) == sets_of(sender)
end
