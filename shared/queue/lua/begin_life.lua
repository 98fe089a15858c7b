-- Gives the life of the shard the name that PostgreSQL has stored as the valid one. From then on,
-- all present data belongs to an earlier life. The caller has the lock of a rebuild, and keeps it.
--
-- KEYS[1] ready
-- KEYS[2] rebuild     the lock: a life and the token of its owner
-- ARGV[1] token
-- ARGV[2] life        its new name, which no life ever had
-- ARGV[3] limit       ms that the lock lasts from now on
-- Returns 1, or 0: Redis was lost again, or the lock expired and another process has it
--!include keys
--!include time
--!include run
--!include life

if redis.call('GET', KEYS[2]) ~= LIFE .. ' ' .. ARGV[1] then return 0 end
redis.call('HSET', LIFE_KEY, 'id', ARGV[2])
redis.call('SET', KEYS[2], ARGV[2] .. ' ' .. ARGV[1], 'PX', ARGV[3])
return 1
