-- Takes the lock of a rebuild, which loads all senders that have waiting jobs and were lost.
--
-- KEYS[1] ready
-- KEYS[2] rebuild     the lock: a life and the token of its owner; void in another life
-- ARGV[1] token
-- ARGV[2] limit       ms that the lock lasts
-- ARGV[3] pause       least ms since the end of the last rebuild; 0: no pause
-- Returns 1, or 0: another rebuild is running, or the last one ended less than `pause` ago
--!include keys
--!include time
--!include run
--!include life

local held = redis.call('GET', KEYS[2])
if held and string.sub(held, 1, #LIFE) == LIFE then return 0 end
local last = tonumber(redis.call('HGET', LIFE_KEY, 'rebuilt') or 0)
-- A time in the future is from an earlier life: the clock stepped back since.
if NOW >= last and NOW < last + tonumber(ARGV[3]) then return 0 end
redis.call('SET', KEYS[2], LIFE .. ' ' .. ARGV[1], 'PX', ARGV[2])
return 1
