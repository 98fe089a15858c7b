-- Starts a load: returns each sender's epoch. load_head.lua refuses the load if it changed since.
--
-- KEYS[1] ready
-- ARGV[1] raise    1: raise the epoch first, because the caller has just committed something that a
--                  load in progress may have missed (so that load is refused); 0: only read it
-- ARGV    then senders
-- Returns the life of the shard, and then an epoch per sender. The epoch of a sender that Redis
-- does not know begins with 'new:', or is '' while Redis is out of memory
--!include keys
--!include time
--!include run
--!include life
--!include epoch

-- ms for which the epoch of an unknown sender is kept. A load that takes longer is refused.
local NEW_MS = 60000
local answer = { LIFE }
for i = 2, #ARGV do
    local id = ARGV[i]
    local key, epoch = settings_of(id), epoch_of(id)
    if epoch == NO_EPOCH then
        -- Delete leftovers of an earlier life, or of a sender that lost some of its keys.
        redis.call('DEL', due_of(id), lease_of(id), window_of(id), key)
    end
    if FULL and is_new(epoch) then
        answer[#answer + 1] = ''
    else
        if epoch == NO_EPOCH then
            -- The clock gives an epoch that no earlier life of this sender can have had.
            redis.call('HSET', key, 'epoch', string.format('%.0f', NOW * 1000), 'life', LIFE)
            redis.call('PEXPIRE', key, NEW_MS)
        elseif ARGV[1] == '1' then
            redis.call('HINCRBY', key, 'epoch', 1)
        end
        answer[#answer + 1] = epoch_of(id)
    end
end
return answer
