-- Redis' clock is the only clock for gap and window. In ms: NOW is rounded down (to test whether a
-- time has passed), NOW_UP is rounded up (to record an end), so that a gap is never too short by a
-- fraction of a millisecond. Tests replace this file to set the time.
local time = redis.call('TIME')
local NOW = time[1] * 1000 + math.floor(time[2] / 1000)
local NOW_UP = time[1] * 1000 + math.ceil(time[2] / 1000)
