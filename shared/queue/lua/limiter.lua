-- Returns the current state of a sender's limiter, without changing it.
--
-- KEYS[1] ready
-- ARGV[1] window  ms of the trailing window
-- ARGV[2] sender
-- ARGV[3] member  of one job
-- Returns nil if Redis does not know the sender, or {in flight, ms until its gap is over, ms until
-- its window has room, ms until the job's lease ends, 1 if the sender is parked}. A time that is
-- over is 0 or less. Without a lease, the fourth is -1.
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include look

local s = read_sender(ARGV[2])
if not s then return nil end
local in_flight = redis.call('ZCARD', lease_of(s.id))
local gap = s.gap > 0 and s.last_end + s.gap or 0
local lease = tonumber(redis.call('ZSCORE', lease_of(s.id), ARGV[3]) or NOW - 1)
local window_room = window_room_at(s, in_flight, tonumber(ARGV[1]))
local parked = redis.call('ZSCORE', parked_of(s.user), s.id)
return { in_flight, gap - NOW, window_room - NOW, lease - NOW, parked and 1 or 0 }
