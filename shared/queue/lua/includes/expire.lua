-- Turns expired leases into used entries. Whether such a job was sent is unknown, so its entry
-- counts from the end of the lease, and the head is loaded again, since the job may wait again. It
-- has its own member (`assumed`): the same attempt may be claimed again and take another entry.
--
-- A restored lease is different. The dispatcher that sends the job may be connected to another
-- server, where it renews and ends the lease. PostgreSQL has the outcome, so the sender's
-- data is discarded, and a load restores it with its present history.

-- ms until such a sender is looked at again: in PostgreSQL the lease may have expired, and not yet
-- been ended by a recovery.
local ASKED_AGAIN = 250

-- Returns false if the data of the sender was discarded.
local function expire_leases(s)
    local leases = lease_of(s.id)
    local expired = redis.call('ZRANGEBYSCORE', leases, '-inf', NOW, 'WITHSCORES')
    if #expired == 0 then return true end
    local restored = restored_leases(s.id)
    for i = 1, #expired, 2 do
        if restored[expired[i]] == tonumber(expired[i + 1]) then
            redis.call('DEL', due_of(s.id), leases, window_of(s.id), settings_of(s.id))
            users[user_of(s.id) or ''] = nil
            return false
        end
    end
    for i = 1, #expired, 2 do
        redis.call('ZREM', leases, expired[i])
        local entry = assumed(expired[i])
        while redis.call('ZSCORE', window_of(s.id), entry) do entry = assumed(entry) end
        redis.call('ZADD', window_of(s.id), expired[i + 1], entry)
        s.last_end = math.max(s.last_end, tonumber(expired[i + 1]))
    end
    -- `loading` and the number of sets are stored, because the visit ends here if the data of its
    -- user is discarded.
    redis.call('HSET', settings_of(s.id), 'end', s.last_end, 'loading', NOW)
    store_sets(s)
    -- A load in progress may have read PostgreSQL before this.
    redis.call('HINCRBY', settings_of(s.id), 'epoch', 1)
    s.loading = NOW
    return true
end
