-- Renews leases: each ends a full lease time from now.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV[2] lease    ms from now
-- ARGV    then flat: sender, member, key of its user
-- Returns an array of the new ends (ms), in the order of ARGV. 0: the lease does not exist any
-- more, or Redis does not know the sender
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include limits
--!include sender
--!include look

local window, until_ms = tonumber(ARGV[1]), NOW + tonumber(ARGV[2])
local ends, touched, owners = {}, {}, {}
for i = 3, #ARGV, 3 do
    local id, member = ARGV[i], ARGV[i + 1]
    -- Renewed separately: while one limiter is lost, the lease of the other must not expire.
    local s, owner = touched[id] or read_sender(id, true), read_user(ARGV[i + 2])
    if owner and owner ~= LOST then
        if redis.call('ZADD', lease_of(owner.id), 'XX', 'CH', until_ms, member) == 1 then
            owners[owner.id] = owner
        end
    end
    if s and redis.call('ZADD', lease_of(id), 'XX', 'CH', until_ms, member) == 1 then
        touched[id] = s
        extend_probe(s, member, until_ms)
        ends[#ends + 1] = until_ms
    else
        local same = s and redis.call('ZSCORE', lease_of(id), member)
        ends[#ends + 1] = same and tonumber(same) or 0
    end
end
for _, s in pairs(touched) do schedule_look(s, window) end
for _, owner in pairs(owners) do schedule_user(owner, window) end
return ends
