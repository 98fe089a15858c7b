-- Says which of these senders, for each of which something waits in PostgreSQL, must be loaded: all
-- or some of their keys are gone, or of an earlier life. Where only the entry in `ready` is gone,
-- it is put back.
--
-- KEYS[1] ready
-- ARGV[1] window   ms of the trailing window
-- ARGV    then senders
-- Returns an array of senders
--!include keys
--!include time
--!include run
--!include life
--!include circuit
--!include look

local lost = {}
for i = 2, #ARGV do
    local s = read_sender(ARGV[i])
    if s then schedule_look(s, tonumber(ARGV[1])) end
    -- Known, active, and nothing to look for: a load that nobody finished.
    if not s or s.active and not redis.call('ZSCORE', READY, s.id) then
        lost[#lost + 1] = ARGV[i]
    end
end
wake_sleepers()
return lost
