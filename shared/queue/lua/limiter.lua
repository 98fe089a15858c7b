-- Returns the current state of a sender's limiter and of its user's, without changing them.
--
-- KEYS[1] ready
-- ARGV[1] window  ms of the trailing window
-- ARGV[2] sender
-- ARGV[3] member  of one job
-- Returns nil if Redis does not know the sender, or {ms until the job's lease ends (without a lease
-- -1), 1 if the sender is parked, its pace (ms), in flight, ms until its gap is over, and its
-- window has room}. A time in the past is 0 or less. If its user has limits: then the last three
-- of the user, the user's limit (0: none) and gap
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include limits
--!include sender

local window, s = tonumber(ARGV[1]), read_sender(ARGV[2])
if not s then return nil end
local lease = tonumber(redis.call('ZSCORE', lease_of(s.id), ARGV[3]) or NOW - 1)
local parked = redis.call('ZSCORE', parked_of(s.user), s.id)
local state = { lease - NOW, parked and 1 or 0, s.pace }
local function add(one)
    local in_flight = redis.call('ZCARD', lease_of(one.id))
    local gap = one.gap > 0 and one.last_end + one.gap or 0
    state[#state + 1] = in_flight
    state[#state + 1] = gap - NOW
    state[#state + 1] = window_room_at(one, in_flight, window) - NOW
end
add(s)
if s.owner then
    add(s.owner)
    state[#state + 1] = s.owner.limit < NO_LIMIT and s.owner.limit or 0
    state[#state + 1] = s.owner.gap
end
return state
