-- Turns expired leases into used entries. Whether such a job was sent is unknown, so its entry
-- counts from the end of the lease, and the head is loaded again, since the job may wait again. It
-- has its own member (`assumed`): the same attempt may be claimed again and take another entry.
local function expire_leases(s)
    local leases = lease_of(s.id)
    local expired = redis.call('ZRANGEBYSCORE', leases, '-inf', NOW, 'WITHSCORES')
    for i = 1, #expired, 2 do
        redis.call('ZREM', leases, expired[i])
        local entry = assumed(expired[i])
        while redis.call('ZSCORE', window_of(s.id), entry) do entry = assumed(entry) end
        redis.call('ZADD', window_of(s.id), expired[i + 1], entry)
        s.last_end = math.max(s.last_end, tonumber(expired[i + 1]))
    end
    if #expired > 0 then
        redis.call('HSET', settings_of(s.id), 'end', s.last_end)
        -- A load in progress may have read PostgreSQL before this.
        redis.call('HINCRBY', settings_of(s.id), 'epoch', 1)
        s.loading = NOW
    end
end
