-- Removes senders that belong to another shard, and limiters of users. Claims of them that are not
-- confirmed yet are not sent.
--
-- KEYS[1] ready
-- ARGV    senders, or limiters of users
-- Returns how many of them were known
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include limits
--!include sender

local known = 0
for _, id in ipairs(ARGV) do
    local s = not user_of(id) and read_sender(id, true)
    if s then leave_all_waiters(s) end
    if s or redis.call('EXISTS', settings_of(id)) == 1 then known = known + 1 end
    redis.call('DEL', due_of(id), lease_of(id), window_of(id), settings_of(id))
    redis.call('ZREM', READY, id)
end
return known
