-- Identifies the server process: after a restart or a failover the run_id differs. It is never in
-- a snapshot. Costs 6 us per script run. Tests replace this file to simulate a restart.
local RUN = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
