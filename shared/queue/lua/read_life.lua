-- Returns the life of the shard, and the time of this server.
--
-- KEYS[1] ready
-- Returns {life, ms}
--!include keys
--!include time
--!include run
--!include life

return { LIFE, NOW }
