-- Returns which of these senders have another first waiting job in PostgreSQL than Redis knows of.
-- Only known senders are returned: find_lost.lua finds the others. A job that a dispatcher has just
-- ended may be among them; the load then changes nothing.
--
-- KEYS[1] ready
-- ARGV    flat: sender, member of its first waiting job, when that is due (ms)
-- Returns an array of senders
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include limits
--!include sender
--!include restored

-- A job whose row was locked is put back at most this many ms late.
local PUT_BACK = 5000

local function is_outdated(s, member, due)
    local known = redis.call('ZSCORE', due_of(s.id), member)
    if known then return tonumber(known) > due + PUT_BACK end
    local lease = redis.call('ZSCORE', lease_of(s.id), member)
    -- A restored lease belongs to a job that was SENDING, and now waits.
    return not lease or restored_leases(s.id)[member] == tonumber(lease)
end

local outdated = {}
for i = 1, #ARGV, 3 do
    local s = read_sender(ARGV[i])
    if s and is_outdated(s, ARGV[i + 1], tonumber(ARGV[i + 2])) then
        outdated[#outdated + 1] = ARGV[i]
    end
end
return outdated
