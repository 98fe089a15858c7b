-- Reads the limiter of a user: a window and a gap that all senders of the user share. It is stored
-- like a sender without jobs, so the functions of a sender's limits apply to it. All senders of a
-- user who has one are in one shard.

-- Stands for a window that is not limited.
local NO_LIMIT = 999999999
local LOST = 'lost'
local users = {}

-- Returns the limiter of a user; nil if there is none; LOST if its keys are lost or being loaded.
-- One object per user and script run, because the senders of a claim share it; false means none.
local function read_user(user)
    if user == '' then return nil end
    if users[user] ~= nil then return users[user] or nil end
    local id = limiter_of(user)
    local f = redis.call('HMGET', settings_of(id), 'limit', 'gap', 'end', 'life', 'sets')
    if f[4] ~= LIFE then
        users[user] = false
        return nil
    end
    if not is_known(id, f[1], f[4], f[5]) then return LOST end
    local limit, gap = tonumber(f[1]) or USER_LIMIT, tonumber(f[2]) or USER_GAP
    users[user] = {
        id = id,
        user = user,
        limit = limit > 0 and limit or NO_LIMIT,
        gap = gap,
        flight = NO_LIMIT,
        last_end = tonumber(f[3] or 0),
        sets = tonumber(f[5]),
        open = false,
        probe = 0,
        cool = 0,
        opens = 0,
    }
    return users[user]
end

-- Removes the limiter of a user who has no limits any more.
local function forget_user(user)
    local id = limiter_of(user)
    redis.call('DEL', settings_of(id), lease_of(id), window_of(id), turns_of(user))
    redis.call('ZREM', READY, id)
    users[user] = nil
end

-- Whether a user whose own limits are `limited` must have a limiter in Redis.
local function needs_limiter(limited) return limited or USER_LIMIT > 0 or USER_GAP > 0 end
