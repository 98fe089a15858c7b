-- Returns which of these senders must be loaded: those with keys that are lost or from an earlier
-- life. If only the entry in `ready` is lost, it is restored here. The caller passes senders that
-- have waiting jobs in PostgreSQL.
--
-- KEYS[1] ready
-- KEYS[2] generation  the life in which the shard was completely loaded
-- ARGV[1] window      ms of the trailing window
-- ARGV[2] whole       1: return none unless the shard is whole, because a rebuild loads them
-- ARGV    then senders
-- Returns an array of senders
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include limits
--!include sender
--!include look
--!include whole

local lost = {}
if ARGV[2] == '1' and not is_whole(KEYS[2]) then return lost end
for i = 3, #ARGV do
    local s = read_sender(ARGV[i])
    if s then schedule_look(s, tonumber(ARGV[1])) end
    -- Known and active, but without a next look: a load did not finish.
    if not s or s.active and not redis.call('ZSCORE', READY, s.id) then
        lost[#lost + 1] = ARGV[i]
    end
end
wake_sleepers()
return lost
