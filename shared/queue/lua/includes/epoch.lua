-- What a load must still find. A sender that Redis does not know, and whose history the load will
-- bring, has an epoch too: a load that began before Redis lost the sender would bring an old one.
local function is_new(epoch) return string.sub(epoch, 1, 4) == 'new:' end

-- Read as text: a Lua number keeps only 14 of its digits.
local function epoch_of(sender)
    local f = redis.call('HMGET', settings_of(sender), 'epoch', 'limit')
    return (f[2] and '' or 'new:') .. (f[1] or '')
end
