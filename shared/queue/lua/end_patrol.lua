-- Stores the place from which the next part of a patrol begins.
--
-- KEYS[1] ready    of the shard that keeps the place, as in begin_patrol.lua
-- ARGV[1] sender   the last one of the part, or 0 after the last part
--!include keys
--!include time
--!include run
--!include life

redis.call('HSET', LIFE_KEY, 'patrol', ARGV[1])
