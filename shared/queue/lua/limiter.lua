-- Returns the current state of a sender's limiter, without changing it.
--
-- KEYS[1] ready
-- ARGV[1] window  ms of the trailing window
-- ARGV[2] sender
-- Returns nil if Redis does not know the sender, or
--   {in flight, ms until its gap is over, ms until its window has room}; 0 or less: already so
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
return { in_flight, gap - NOW, window_room_at(s, in_flight, tonumber(ARGV[1])) - NOW }
