-- Says which claims still hold, asked after the jobs were marked in PostgreSQL and before SMTP.
-- If Redis was lost in between, a rebuild cannot have seen a mark that came after its look, and
-- would hand the sender's slot to another: such a claim must be given back, unsent.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV    then flat: sender, member, when its lease runs out as claim.lua said
-- Returns an array of 1 (held) and 0 (gone), in the order of ARGV
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include look

local window = tonumber(ARGV[1])
local held = {}
for i = 2, #ARGV, 3 do
    local id, member, until_ms = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
    -- A sender whose keys are gone is about to be loaded anew, its leases from what was marked.
    local s = read_sender(id)
    local found = s and redis.call('ZSCORE', lease_of(id), member)
    if found and tonumber(found) ~= until_ms then
        -- Claimed again since a loss, by one whose mark is refused: it must not free our lease.
        redis.call('ZADD', lease_of(id), until_ms, member)
        schedule_look(s, window)
    end
    held[#held + 1] = found and 1 or 0
end
return held
