-- Takes the lock of a rebuild, which loads all senders that have waiting jobs and were lost.
--
-- KEYS[1] ready
-- KEYS[2] generation  the life in which the shard was completely loaded
-- KEYS[3] rebuild     the lock: a life and the token of its owner; void in another life
-- ARGV[1] token
-- ARGV[2] limit       ms that the lock lasts
-- Returns 1, or 0: another rebuild is running
--!include keys
--!include time
--!include run
--!include life
--!include whole

local held = redis.call('GET', KEYS[3])
if held and string.sub(held, 1, #LIFE) == LIFE then return 0 end
redis.call('SET', KEYS[3], LIFE .. ' ' .. ARGV[1], 'PX', ARGV[2])
if not is_whole(KEYS[2]) then
    -- The guard is back before the first load, so that a loss of `ready` from here on is noticed.
    -- Until the end of the rebuild the shard is not whole.
    redis.call('DEL', KEYS[2])
    redis.call('ZADD', READY, GUARD_AT, GUARD)
end
return 1
