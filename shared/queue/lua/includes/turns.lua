-- Shares the limits of a user between its senders, in turns.
--
-- A sender that could send, and whose user may not, is in `turns:<user>`, in the order of arrival.
-- In `ready` it is scored for a recheck, so that a loss of this key strands no sender. Instead of
-- all of them, the user's limiter is in `ready`, for the time at which the user may send again.
-- Then the first sender sends one mail and goes to the end. So each sender gets its turn, however
-- many mails another has, and a waiting sender costs nothing.

-- Limit.USER_WINDOW, Limit.USER_GAP: whether the user may send one more mail now.
local function user_admits(owner, window)
    local in_flight = redis.call('ZCARD', lease_of(owner.id))
    return places(owner, in_flight) > 0 and allowed_at(owner, in_flight, window) <= NOW
end

-- Whether the sender may send now as far as its user is concerned. `turn`: the sender whose turn
-- it is. Any other waits behind those that wait already.
local function owner_admits(s, window, turn)
    if not s.owner then return true end
    local first = redis.call('ZRANGE', turns_of(s.user), 0, 0)[1]
    return (not first or first == s.id or turn == s.id) and user_admits(s.owner, window)
end

-- Returns when to check a sender whose own limits and circuits allow a send from `at` on.
local function through_user(s, at, window)
    if not s.owner then return at end
    local turns = turns_of(s.user)
    if at > NOW then
        redis.call('ZREM', turns, s.id)
        return at
    end
    -- A sender that waits keeps its place until its turn, even if the user may send by now.
    if redis.call('ZSCORE', turns, s.id) then return NOW + RECHECK end
    if owner_admits(s, window) then return at end
    local last = redis.call('ZRANGE', turns, -1, -1, 'WITHSCORES')[2]
    redis.call('ZADD', turns, math.max(NOW, last and tonumber(last) + 1 or 0), s.id)
    return NOW + RECHECK
end

-- Puts the limiter of a user into `ready` for the next instant at which there is something to do.
local function schedule_user(owner, window)
    store_sets(owner)
    local look, in_flight = first_expiry(owner)
    local turns = turns_of(owner.user)
    local first = redis.call('ZRANGE', turns, 0, 0, 'WITHSCORES')[2]
    if first and places(owner, in_flight) > 0 then
        local since = math.min(NOW, tonumber(first))
        look = math.min(look, math.max(since, allowed_at(owner, in_flight, window)))
    end
    -- It expires with `turns`, so that it does not outlive the rechecks of its senders.
    redis.call('PEXPIRE', turns, 2 * RECHECK)
    if look < math.huge then
        redis.call('ZADD', READY, look, owner.id)
    else
        redis.call('ZREM', READY, owner.id)
    end
    if in_flight == 0 and not first then
        expire_history(owner, window)
    else
        redis.call('PERSIST', settings_of(owner.id))
        redis.call('PERSIST', window_of(owner.id))
    end
end
