-- The life of a shard: data that was loaded in an earlier life is discarded and loaded again.
-- A life ends when
-- - the server's process ends, or a replica becomes the primary: leases and ends in a snapshot or
--   on a replica may be outdated;
-- - the server's clock steps back by a second or more: stored ends would lie in the future (after
--   a smaller step, NOW stands still until the clock has caught up);
-- - LIFE_KEY is lost.
--
-- The next life is provisional and has a colon in its name. Then a dispatcher gives it a name that
-- PostgreSQL stores as the valid one (begin_life.lua, shared/heads/lives.py). What was loaded
-- before is discarded again, because the history may have been read before the former life became
-- invalid.

-- A key that never exists. While the slot of a shard is being moved to another node, reading it
-- fails, so that no script stops half way at a key that has been moved already.
redis.call('EXISTS', prefix .. 'absent')

local LIFE_KEY = prefix .. 'life'
local STEP = 1000
local LIFE
-- Whether Redis is out of memory (noeviction). Settling and renewing claims still works, because
-- it frees memory; no new sender is loaded.
local FULL = false
-- The limits of users without limits of their own: sends in a window, and gap in ms; 0 means none.
-- The dispatcher that claimed last has set them.
local USER_LIMIT, USER_GAP = 0, 0
-- By how many ms this server's clock is ahead of PostgreSQL's, as far as the dispatcher that
-- claimed last knows; 0 if it is behind. Times that PostgreSQL decides (due times, sending hours)
-- have come by NOW if they are at most NOW - AHEAD.
local AHEAD = 0
-- The stored texts of both, as a claim writes them.
local STORED_USERS, STORED_AHEAD
do
    local f = redis.call('HMGET', LIFE_KEY, 'replication', 'id', 'seen', 'users', 'ahead')
    local seen = tonumber(f[3] or 0)
    local begun = {}
    LIFE = f[2]
    if f[1] ~= RUN or NOW <= seen - STEP then
        LIFE = string.sub(RUN, 1, 8) .. string.format(':%.0f', NOW)
        -- The last release compares the id of the process.
        local process = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
        begun = { 'id', LIFE, 'replication', RUN, 'run', process }
    else
        NOW, NOW_UP = math.max(NOW, seen), math.max(NOW_UP, seen)
    end
    STORED_USERS, STORED_AHEAD = f[4], f[5]
    local limit, gap = string.match(f[4] or '', '^(%d+) (%d+)$')
    if limit then USER_LIMIT, USER_GAP = tonumber(limit), tonumber(gap) end
    AHEAD = tonumber(f[5] or 0)
    local stored = redis.pcall('HSET', LIFE_KEY, 'seen', NOW, unpack(begun))
    if type(stored) == 'table' and stored.err then
        FULL = true
        -- Redis never refuses a deletion, and it refuses a script no memory after its first write,
        -- so that scripts do not stop half way.
        redis.call('HDEL', LIFE_KEY, '')
        redis.call('HSET', LIFE_KEY, 'seen', NOW, unpack(begun))
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
