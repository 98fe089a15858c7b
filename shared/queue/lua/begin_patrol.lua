-- Gives the caller the next part of a patrol, unless a process had one less than `pause` ago.
--
-- KEYS[1] ready    of the shard that keeps the place of the patrol, for all shards
-- ARGV[1] pause    least ms between two parts
-- Returns the id of the last sender before the part as text ('0': the first part), or nil
--!include keys
--!include time
--!include run
--!include life

local f = redis.call('HMGET', LIFE_KEY, 'patrolled', 'patrol')
local last = tonumber(f[1] or 0)
-- A time in the future is from an earlier life, before a step of the clock.
if NOW >= last and NOW < last + tonumber(ARGV[1]) then return nil end
redis.call('HSET', LIFE_KEY, 'patrolled', NOW)
return f[2] or '0'
