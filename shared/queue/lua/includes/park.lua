-- Parks senders of users who may have no more slots of the dispatcher that claims. So the senders
-- of one user, however many, do not delay those of another.
--
-- `parked:<user>` has the user's parked senders by the look that they had, `parked` the users by
-- the time of their last turn. In `ready` a parked sender is scored for a recheck, so that no
-- sender is stranded by a loss of these keys, or by a dispatcher that does not know them. They may
-- be stale: a sender that was parked may have been visited since.

-- The maximum number of users whose parked senders one claim considers.
local MOST_USERS = 32

local function park(s, look)
    redis.call('ZADD', parked_of(s.user), look, s.id)
    redis.call('PEXPIRE', parked_of(s.user), 2 * RECHECK)
    redis.call('ZADD', PARKED, 'NX', NOW, s.user)
    redis.call('PEXPIRE', PARKED, 2 * RECHECK)
    redis.call('ZADD', READY, NOW + RECHECK, s.id)
end

-- Moves up to `room_of(user)` parked senders of each user back to their place in `ready`. Returns
-- how many.
local function unpark(room_of)
    local moved = 0
    for _, user in ipairs(redis.call('ZRANGE', PARKED, 0, MOST_USERS - 1)) do
        local parked, room = parked_of(user), room_of(user)
        if room > 0 then
            local senders = redis.call('ZRANGE', parked, 0, room - 1, 'WITHSCORES')
            moved = moved + #senders / 2
            for i = 1, #senders, 2 do
                redis.call('ZREM', parked, senders[i])
                redis.call('ZADD', READY, 'XX', 'LT', senders[i + 1], senders[i])
            end
            if redis.call('EXISTS', parked) == 1 then
                redis.call('ZADD', PARKED, 'XX', NOW, user)
            else
                redis.call('ZREM', PARKED, user)
            end
        end
    end
    return moved
end
