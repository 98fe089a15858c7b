-- Claims jobs that may be sent now, oldest look first, for each user within limits that the caller
-- gives. A lease on each job reserves its entry.
--
-- KEYS[1] ready       the shard's senders by next look (ms)
-- KEYS[2] generation  the life in which the shard was completely loaded (whole.lua)
-- ARGV[1] want        most jobs to claim
-- ARGV[2] lease       ms that the caller holds each of them
-- ARGV[3] window      ms of the trailing window
-- ARGV[4] low         a head with fewer jobs than this requests a load, if PostgreSQL has more
-- ARGV[5] patience    ms after which a load is requested again
-- ARGV[6] limits      '', or a map (cmsgpack) of users to {first, most}: `first` jobs of a user are
--                     claimed in turn; more, up to `most`, only if no other user's job is left
-- ARGV[7] users       sends in a window and gap (ms), with a space between, of users that have no
--                     limits of their own; 0: none
-- ARGV[8] ahead       ms by which this server's clock is ahead of PostgreSQL's (life.lua)
--
-- Returns {'OK' or 'LOST', ms until the next look or -1, claims, loads, parked, life}:
--   LOST    the shard is incomplete: start a rebuild. Loaded senders may send meanwhile
--   claims  flat: sender, member, ms since the earliest instant at which the limits allowed it,
--           when its lease expires, when it was due, 1 if it is the probe of a cooldown, the limit
--           that made it wait after it was due ('' if none did), user
--   loads   senders whose head the caller must load
--   parked  1 if senders wait because their user may have no more (park.lua)
--   life    the life in which the claims were made
--
-- A sender that may not send yet has a later score in `ready`, so it is not visited. The cost
-- depends on the jobs claimed, never on the jobs that wait.
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include limits
--!include sender
--!include look
--!include restored
--!include expire
--!include whole
--!include park

local want, lease, window = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local low, patience = tonumber(ARGV[4]), tonumber(ARGV[5])
local limits = ARGV[6] ~= '' and cmsgpack.unpack(ARGV[6]) or {}

if STORED_USERS ~= ARGV[7] or STORED_AHEAD ~= ARGV[8] then
    redis.call('HSET', LIFE_KEY, 'users', ARGV[7], 'ahead', ARGV[8])
end
local limit, gap = string.match(ARGV[7], '^(%d+) (%d+)$')
USER_LIMIT, USER_GAP, AHEAD = tonumber(limit), tonumber(gap), tonumber(ARGV[8])

local claims, loads, taken = {}, {}, 0
-- The jobs claimed of each user with a limit, and which of the two limits applies now.
local of_user, stage = {}, 1

-- How many more jobs of a user may be claimed.
local function room_of(user)
    local most = limits[user]
    return math.min(want - taken, most and most[stage] - (of_user[user] or 0) or math.huge)
end

-- The sender whose turn it is to use the limits of its user.
local turn

--!include visit

-- Visits the senders of a user, in turns, while the user's limits allow it.
local function visit_user(user)
    local owner = read_user(user)
    if not owner or owner == LOST then
        redis.call('ZREM', READY, limiter_of(user))
        -- The load of one of its senders brings the limiter.
        local first = redis.call('ZRANGE', turns_of(user), 0, 0)[1]
        if first then redis.call('ZADD', READY, 'LT', NOW, first) end
        return
    end
    if not expire_leases(owner) then
        redis.call('ZADD', READY, NOW + ASKED_AGAIN, owner.id)
        return
    end
    for _ = 1, math.min(want + 64, redis.call('ZCARD', turns_of(user))) do
        if room_of(user) <= 0 or not user_admits(owner, window) then break end
        turn = redis.call('ZPOPMIN', turns_of(user))[1]
        visit(turn)
        turn = nil
    end
    forget_old_ends(owner, 2)
    schedule_user(owner, window)
    local look = redis.call('ZSCORE', READY, owner.id)
    if room_of(user) <= 0 and look and tonumber(look) <= NOW then park(owner, look) end
end

-- Parks a sender whose user has no room, without a visit: that follows once it is moved back.
-- Returns false if it must be visited now.
local function park_unread(sender, look)
    if not next(limits) then return false end
    local f = redis.call('HMGET', settings_of(sender), 'user', 'limit', 'life', 'sets')
    if not f[1] or room_of(f[1]) > 0 or not is_known(sender, f[2], f[3], f[4]) then return false end
    if redis.call('ZCOUNT', lease_of(sender), '-inf', NOW) > 0 then return false end
    park({ id = sender, user = f[1] }, look)
    return true
end

-- Almost every visit claims a job or moves the sender's look past NOW. The bound on visits is for
-- those that do neither, such as many expired leases at once, or senders that are parked. A visit
-- may change the looks of others, so the next sender is read after each.
local function visit_due(most)
    for _ = 1, most do
        if taken >= want then return end
        local first = redis.call('ZRANGEBYSCORE', READY, '-inf', NOW, 'WITHSCORES', 'LIMIT', 0, 1)
        local sender = first[1]
        if not sender then return end
        local user = user_of(sender)
        if user then
            visit_user(user)
        elseif not park_unread(sender, first[2]) then
            visit(sender)
        end
    end
end

-- If jobs of a parked sender were claimed meanwhile, its place is free for another one of the user.
-- Returns whether there may be more than are considered at once.
local function visit_parked()
    for _ = 1, 4 do
        local moved = unpark(room_of)
        visit_due(want + 64)
        if moved == 0 or taken >= want then return false end
    end
    return true
end

local more = visit_parked()
if taken < want and redis.call('EXISTS', PARKED) == 1 then
    stage = 2
    more = visit_parked()
end

local look = more and NOW or first_look()
if taken < want then
    -- The caller has room left and will sleep until `look`; others may sleep for longer.
    local asleep = redis.call('GET', ASLEEP)
    if not asleep or asleep ~= 'inf' and (not look or look > tonumber(asleep)) then
        redis.call('SET', ASLEEP, look or 'inf')
    end
else
    wake_sleepers()
end
local state = is_whole(KEYS[2]) and 'OK' or 'LOST'
local parked = redis.call('EXISTS', PARKED)
return { state, look and math.max(0, look - NOW) or -1, claims, loads, parked, LIFE }
