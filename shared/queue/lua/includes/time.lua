-- Redis' clock is the only clock of gap and window. In ms: NOW is rounded down (for what must have
-- passed), NOW_UP is rounded up (for what has just ended), so that a gap is never short by a part
-- of a millisecond. Tests replace this file to set the time.
local time = redis.call('TIME')
local NOW = time[1] * 1000 + math.floor(time[2] / 1000)
local NOW_UP = time[1] * 1000 + math.ceil(time[2] / 1000)
