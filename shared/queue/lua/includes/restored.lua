-- Returns the leases that the last restoring of a history brought, by member.
local function restored_leases(id)
    local leases = {}
    local texts = redis.call('HGET', settings_of(id), 'restored') or ''
    for member, at in string.gmatch(texts, '(%S+) (%S+)') do leases[member] = tonumber(at) end
    return leases
end
