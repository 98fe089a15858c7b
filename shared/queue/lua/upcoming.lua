-- Returns jobs that may be sent soon, so that a dispatcher prepares their mails. Changes nothing.
--
-- KEYS[1] ready
-- ARGV[1] after   the place where the last call ended (ms), or 0
-- ARGV[2] skip    how many senders with that look it has examined
-- ARGV[3] within  ms from now; later looks are not examined
-- ARGV[4] most    most senders to examine
--
-- Returns {after, skip, more, members}:
--   after, skip  for the next call
--   more         1 if there are more senders to examine already
--   members      the first job of each sender whose next look comes soon
--
-- It is a hint: a job may be sent earlier, later or never. So only the first job is read. The
-- senders of a user whose limits make them wait are not examined.
--!include keys
--!include time

local after, skip = tonumber(ARGV[1]), tonumber(ARGV[2])
local within, most = tonumber(ARGV[3]), tonumber(ARGV[4])
-- Senders that may send now are left to claims. If the place is after all looks, the clock was set
-- back.
if after < NOW or after > NOW + within + 1 then after, skip = NOW, 0 end

local found = redis.call('ZRANGEBYSCORE', READY, after, NOW + within, 'WITHSCORES',
    'LIMIT', skip, most)
local members, more = {}, #found == 2 * most
for i = 1, #found, 2 do
    local first = not user_of(found[i]) and redis.call('ZRANGE', due_of(found[i]), 0, 0)[1]
    if first then members[#members + 1] = first end
end
if more then
    local last = tonumber(found[#found])
    if last > after then after, skip = last, 0 end
    for i = #found, 1, -2 do
        if tonumber(found[i]) ~= last then break end
        skip = skip + 1
    end
else
    after, skip = NOW + within + 1, 0
end
return { after, skip, more and 1 or 0, members }
