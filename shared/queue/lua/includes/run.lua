-- Which process answers: a restart, and a replica that takes over, have another run_id. It is
-- never in a snapshot. 6 us, once a script. Tests replace this file to play a restart.
local RUN = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
