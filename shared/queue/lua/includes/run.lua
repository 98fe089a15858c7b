-- Identifies the history of writes that this server continues: its replication id. It changes when
-- the process starts and when a replica is promoted, both of which may lose writes. It is never
-- read from a snapshot or a primary. Costs 4 us per script run. Tests replace this file to simulate
-- a restart.
local RUN = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
