-- Marks the shard as completely loaded, if the caller's rebuild still has the lock: if Redis was
-- lost again in the meantime, it lost the lock as well.
--
-- KEYS[1] ready
-- KEYS[2] generation  the life in which the shard was completely loaded
-- KEYS[3] rebuild     the lock: a life and the token of its owner
-- ARGV[1] token
-- Returns 0: start again; 1: the shard was complete before too; 2: it was not
--!include keys
--!include time
--!include run
--!include life
--!include whole

if redis.call('GET', KEYS[3]) ~= LIFE .. ' ' .. ARGV[1] or not is_guarded() then return 0 end
local before = redis.call('GET', KEYS[2])
redis.call('SET', KEYS[2], LIFE)
redis.call('DEL', KEYS[3])
if before == LIFE then return 1 end
redis.call('PUBLISH', WAKE, '1')
return 2
