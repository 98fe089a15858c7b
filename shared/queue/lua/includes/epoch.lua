-- What a load must still find. A sender that Redis does not know, and whose history the load will
-- bring, has an epoch too: a load that began before Redis lost the sender would bring an old one.
local NO_EPOCH = 'new:'
local function is_new(epoch) return string.sub(epoch, 1, 4) == NO_EPOCH end

-- Read as text: a Lua number keeps only 14 of its digits. NO_EPOCH: no load has begun.
local function epoch_of(sender)
    local f = redis.call('HMGET', settings_of(sender), 'epoch', 'life', 'limit', 'parts')
    if f[2] ~= LIFE then return NO_EPOCH end
    if not f[3] then return NO_EPOCH .. (f[1] or '') end
    return is_known(sender, f[3], f[2], f[4]) and f[1] or NO_EPOCH
end
