-- Declares the shard whole, if the rebuild that asks is still the one under way: a Redis that was
-- lost again in the meantime has lost the rebuild's lock as well.
--
-- KEYS[1] ready
-- KEYS[2] generation
-- KEYS[3] rebuild     the lock, holding the token of its owner
-- ARGV[1] token
-- Returns 1, or 0: start again
--!include keys

if redis.call('GET', KEYS[3]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[1])
redis.call('DEL', KEYS[3])
redis.call('PUBLISH', WAKE, '1')
return 1
