-- The epoch of a sender: a load is refused if it changed after `begin_load` returned it. A sender
-- that Redis does not know, whose history the load will restore, has an epoch too: a load that
-- began before Redis lost the sender would restore an outdated history.
local NO_EPOCH = 'new:'
local function is_new(epoch) return string.sub(epoch, 1, 4) == NO_EPOCH end

-- Returns the epoch as text, because a Lua number keeps only 14 of its digits. NO_EPOCH means that
-- no load has begun.
local function epoch_of(sender)
    local f = redis.call('HMGET', settings_of(sender), 'epoch', 'life', 'limit', 'sets')
    if f[2] ~= LIFE then return NO_EPOCH end
    if not f[3] then return NO_EPOCH .. (f[1] or '') end
    return is_known(sender, f[3], f[2], f[4]) and f[1] or NO_EPOCH
end

-- Notes that a load was refused. Until one succeeds, add_jobs.lua leaves the sender to loads.
local function note_refusal(sender)
    if not is_new(epoch_of(sender)) then redis.call('HSET', settings_of(sender), 'refused', 1) end
end
