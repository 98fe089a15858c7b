-- Returns which claims still have their leases. Called between the mark in PostgreSQL and SMTP. If
-- Redis was lost in between, a rebuild may have read PostgreSQL before the mark, and would give the
-- entry of the window to another job: such a claim must be released unsent.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV    then flat: sender, member, when its lease expires as returned by claim.lua
-- Returns an array of 1 (the lease exists) and 0 (it is gone), in the order of ARGV
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include limits
--!include sender
--!include look

local window = tonumber(ARGV[1])
local results, senders = {}, {}
for i = 2, #ARGV, 3 do
    local id, member, until_ms = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
    -- A sender whose keys are lost will be loaded again, with leases from the marks in PostgreSQL.
    if senders[id] == nil then senders[id] = read_sender(id) or false end
    local s = senders[id]
    local lease = s and redis.call('ZSCORE', lease_of(id), member)
    local owned = lease and s.owner and redis.call('ZSCORE', lease_of(s.owner.id), member)
    -- If the user has no lease, the claim was made before the user had a limiter, or the limiter
    -- was restored before the mark.
    local found = lease and (not s.owner or owned)
    local changed = found and tonumber(lease) ~= until_ms or owned and tonumber(owned) ~= until_ms
    if changed and until_ms <= NOW then
        -- The job was claimed again after our lease had expired.
        found = nil
    elseif changed then
        -- After a loss, another dispatcher claimed the job again; its mark will be refused.
        -- Restore our lease, so that the other claim does not release it.
        redis.call('ZADD', lease_of(id), until_ms, member)
        if s.owner then redis.call('ZADD', lease_of(s.owner.id), until_ms, member) end
        schedule_look(s, window)
    end
    results[#results + 1] = found and 1 or 0
end
return results
