-- Counts the jobs that may be sent now and wait only for a dispatcher, without changing anything.
--
-- KEYS[1] ready       the shard's senders by next look (ms)
-- KEYS[2] generation  the life in which the shard was completely loaded
-- ARGV[1] window      ms of the trailing window
-- ARGV[2] most        most senders to examine; each further one counts as one job
--
-- Returns {'OK' or 'LOST', jobs, ms since the earliest instant at which the limits allowed one}
--
-- A sender counts with no more jobs than its limits allow at once. The cost depends on the senders
-- that may send now, never on the jobs that wait.
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include limits
--!include sender
--!include look
--!include whole

local window, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local jobs, oldest = 0, NOW

-- Each of the senders that wait for their turn counts once.
local function examine_user(user)
    local owner = read_user(user)
    if not owner or owner == LOST or not user_admits(owner, window) then return end
    local in_flight = redis.call('ZCARD', lease_of(owner.id))
    local waiting = redis.call('ZCARD', turns_of(user))
    if waiting == 0 then return end
    jobs = jobs + math.min(places(owner, in_flight), waiting)
    local first = redis.call('ZRANGE', turns_of(user), 0, 0, 'WITHSCORES')[2]
    oldest = math.min(oldest, math.max(allowed_at(owner, in_flight, window), tonumber(first)))
end

local function examine(sender)
    local user = user_of(sender)
    if user then return examine_user(user) end
    local s = read_sender(sender)
    if not s or not s.active or NOW >= s.closes then return end
    local in_flight = redis.call('ZCARD', lease_of(s.id))
    local allowed = allowed_at(s, in_flight, window)
    if allowed > NOW or not admits_sender(s) then return end
    -- `examine_user` counts those that wait for their turn.
    if s.owner and redis.call('ZSCORE', turns_of(s.user), s.id) then return end
    if not owner_admits(s, window) then return end
    local first = redis.call('ZRANGE', due_of(s.id), 0, 0, 'WITHSCORES')[2]
    local room = places(s, in_flight)
    if not first or room <= 0 then return end
    if s.owner then
        local used = redis.call('ZCARD', lease_of(s.owner.id))
        room = math.min(room, places(s.owner, used))
        allowed = math.max(allowed, allowed_at(s.owner, used, window))
    end
    local due = redis.call('ZCOUNT', due_of(s.id), '-inf', NOW - AHEAD)
    if due == 0 then return end
    jobs = jobs + math.min(room, due)
    oldest = math.min(oldest, math.max(allowed, tonumber(first) + AHEAD))
end

local seen, senders = {}, redis.call('ZRANGEBYSCORE', READY, '-inf', NOW, 'LIMIT', 0, most)
for _, user in ipairs(redis.call('ZRANGE', PARKED, 0, -1)) do
    local room = most - #senders
    if room <= 0 then break end
    for _, sender in ipairs(redis.call('ZRANGE', parked_of(user), 0, room - 1)) do
        senders[#senders + 1] = sender
    end
end
for _, sender in ipairs(senders) do
    if not seen[sender] then examine(sender) end
    seen[sender] = true
end
jobs = jobs + math.max(0, redis.call('ZCOUNT', READY, '-inf', NOW) - most)
local state = is_whole(KEYS[2]) and 'OK' or 'LOST'
return { state, jobs, NOW - oldest }
