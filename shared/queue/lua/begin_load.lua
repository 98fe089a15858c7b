-- Starts a load: returns each sender's epoch, which the load must still find when it is applied.
--
-- KEYS[1] ready
-- ARGV[1] raise    1: the caller has just committed something that a load under way cannot have
--                  read, so the epoch is raised and that load will be refused; 0: only read it
-- ARGV    then senders
-- Returns an array of epochs, '' for a sender that Redis does not know
--!include keys

local epochs = {}
for i = 2, #ARGV do
    local key = settings_of(ARGV[i])
    if ARGV[1] == '1' and redis.call('EXISTS', key) == 1 then
        redis.call('HINCRBY', key, 'epoch', 1)
    end
    -- Read back as text: a Lua number keeps only 14 of its digits.
    epochs[#epochs + 1] = redis.call('HGET', key, 'epoch') or ''
end
return epochs
