-- Extends the lock of a rebuild, if the caller still has it.
--
-- KEYS[1] ready
-- KEYS[2] rebuild     the lock: a life and the token of its owner
-- ARGV[1] token
-- ARGV[2] limit       ms that the lock lasts from now on; 0 releases it
-- Returns 1, or 0: Redis was lost again, or the lock expired and another process has it
--!include keys
--!include time
--!include run
--!include life
--!include whole

if redis.call('GET', KEYS[2]) ~= LIFE .. ' ' .. ARGV[1] or not is_guarded() then return 0 end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
