-- Uses every command that the other scripts use, so that it fails if this server refuses one of
-- them: by its access rules, because it renamed the command, or because it may not write.
--
-- KEYS[1] ready   not used
-- KEYS[2] health  a key and a channel that only this script uses; the key is removed again
--
-- Returns the replication id.
--!include keys
--!include time
--!include run
local key = KEYS[2]

if not RUN then return redis.error_reply('INFO tells no replication id') end
-- This write must be the first: Redis gives a script that has written as much memory as it needs.
redis.call('SET', key, NOW, 'PX', 1000)
redis.call('GET', key)
redis.call('DEL', key)

redis.call('HSET', key, 'a', 1, 'b', 1)
redis.call('PEXPIRE', key, 1000)
redis.call('PERSIST', key)
redis.call('HINCRBY', key, 'a', 1)
redis.call('HGET', key, 'a')
redis.call('HMGET', key, 'a', 'b')
redis.call('HDEL', key, 'a', 'b')

redis.call('ZADD', key, 1, 'a', 2, 'b', 3, 'c')
redis.call('ZSCORE', key, 'a')
redis.call('ZCARD', key)
redis.call('ZCOUNT', key, 1, 2)
redis.call('ZRANGE', key, 0, -1)
redis.call('ZRANGEBYSCORE', key, 1, 2)
redis.call('ZREM', key, 'a')
redis.call('ZREMRANGEBYSCORE', key, 2, 2)
redis.call('ZPOPMIN', key)
redis.call('EXISTS', key)
redis.call('PUBLISH', key, 1)
return RUN
