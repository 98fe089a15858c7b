-- Starts a load: returns each sender's epoch, which the load must still find when it is applied.
--
-- KEYS[1] ready
-- ARGV[1] raise    1: the caller has just committed something that a load under way cannot have
--                  read, so the epoch is raised and that load will be refused; 0: only read it
-- ARGV    then senders
-- Returns an array of epochs, with 'new:' before that of a sender that Redis does not know; ''
-- for such a sender while Redis is out of memory
--!include keys
--!include time
--!include run
--!include life
--!include epoch

-- ms for which the epoch of a sender that is not known is kept; later its load is refused.
local NEW_MS = 60000
local epochs = {}
for i = 2, #ARGV do
    local id = ARGV[i]
    local key, epoch = settings_of(id), epoch_of(id)
    if epoch == NO_EPOCH then
        -- What may be left of an earlier life, or of a sender that is not whole.
        redis.call('DEL', due_of(id), lease_of(id), window_of(id), key)
    end
    if FULL and is_new(epoch) then
        epochs[#epochs + 1] = ''
    else
        if epoch == NO_EPOCH then
            -- One that no earlier life of this sender can have had.
            redis.call('HSET', key, 'epoch', string.format('%.0f', NOW * 1000), 'life', LIFE)
            redis.call('PEXPIRE', key, NEW_MS)
        elseif ARGV[1] == '1' then
            redis.call('HINCRBY', key, 'epoch', 1)
        end
        epochs[#epochs + 1] = epoch_of(id)
    end
end
return epochs
