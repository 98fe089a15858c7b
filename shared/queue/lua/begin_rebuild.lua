-- Takes the lock of a rebuild, which goes through the senders for which something waits and loads
-- those that are lost.
--
-- KEYS[1] ready
-- KEYS[2] rebuild     the lock: a life and the token of its owner, so that none outlives its life
-- ARGV[1] token
-- ARGV[2] limit       ms that the lock lasts
-- ARGV[3] pause       ms since the end of the last one before which there is nothing to do; 0: now
-- Returns 1, or 0: another rebuild is under way, or the last one was just now
--!include keys
--!include time
--!include run
--!include life

local held = redis.call('GET', KEYS[2])
if held and string.sub(held, 1, #LIFE) == LIFE then return 0 end
local last = tonumber(redis.call('HGET', LIFE_KEY, 'rebuilt') or 0)
-- A time in the future is of another life, before the clock stepped back.
if NOW >= last and NOW < last + tonumber(ARGV[3]) then return 0 end
redis.call('SET', KEYS[2], LIFE .. ' ' .. ARGV[1], 'PX', ARGV[2])
return 1
