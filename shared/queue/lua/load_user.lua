-- Stores the limits of one user. If Redis does not know its limiter, the history of all sends of
-- the user is restored as well. Since begin_load.lua, no sender of the user may send meanwhile.
--
-- KEYS[1] ready
-- ARGV[1] window  ms of the trailing window
-- ARGV[2] epoch   of the limiter, as begin_load returned it
-- ARGV[3] user    a map (cmsgpack):
--   user          its key
--   limit, gap    sends in a window and ms, 0: none; '': as for all users (life.lua)
--   ends, leases  of its senders, as in load_head.lua
--
-- Returns 1, or 0 if the epoch has changed: the caller reads PostgreSQL again.
--!include keys
--!include time
--!include run
--!include life
--!include epoch
--!include circuit
--!include limits
--!include sender
--!include look
--!include history

local window, epoch, user = tonumber(ARGV[1]), ARGV[2], cmsgpack.unpack(ARGV[3])
local id = limiter_of(user.user)
local settings = settings_of(id)
if epoch_of(id) ~= epoch then return 0 end

if is_new(epoch) then
    local restored = restore_history(id, user.ends, user.leases)
    if restored ~= '' then redis.call('HSET', settings, 'restored', restored) end
else
    local f = redis.call('HMGET', settings, 'limit', 'gap')
    if f[1] ~= tostring(user.limit) or f[2] ~= tostring(user.gap) then
        -- A load that read PostgreSQL before this must not restore the old limits.
        redis.call('HINCRBY', settings, 'epoch', 1)
    end
end
redis.call('HSET', settings, 'limit', user.limit, 'gap', user.gap, 'sets', sets_of(id))
redis.call('PERSIST', settings)
redis.call('PERSIST', window_of(id))
schedule_user(read_user(user.user), window)
wake_sleepers()
return 1
