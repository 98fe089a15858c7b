-- Says which claims still hold, asked after the jobs were marked in PostgreSQL and before SMTP.
-- If Redis was lost in between, a rebuild cannot have seen a mark that came after its look, and
-- would hand the sender's slot to another: such a claim must be given back, unsent.
--
-- KEYS[1] ready
-- ARGV    flat: sender, member
-- Returns an array of 1 (held) and 0 (gone), in the order of ARGV
--!include keys

local held = {}
for i = 1, #ARGV, 2 do
    -- A sender whose settings are gone is about to be loaded anew, its leases from what was marked.
    local known = redis.call('HEXISTS', settings_of(ARGV[i]), 'limit') == 1
    held[#held + 1] = known and redis.call('ZSCORE', lease_of(ARGV[i]), ARGV[i + 1]) and 1 or 0
end
return held
