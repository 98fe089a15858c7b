-- The only place where scripts build keys. Every key of a shard has the shard's hash tag, so all
-- keys of a sender are in one slot of a cluster. KEYS[1] is always the shard's `ready`.
local prefix = string.match(KEYS[1], '^(.-%}):') .. ':'
local READY = KEYS[1]
local GUARD = 'guard' -- a member of `ready` that is not a sender (whole.lua)
local ASLEEP = prefix .. 'asleep'
local WAKE = prefix .. 'wake' -- a channel
local PARKED = prefix .. 'parked'

local function due_of(sender) return prefix .. 'due:' .. sender end
local function lease_of(sender) return prefix .. 'lease:' .. sender end
local function window_of(sender) return prefix .. 'window:' .. sender end
local function settings_of(sender) return prefix .. 'sender:' .. sender end
local function parked_of(user) return prefix .. 'parked:' .. user end
local function turns_of(user) return prefix .. 'turns:' .. user end
local function circuit_of(endpoint) return prefix .. 'circuit:' .. endpoint end
local function waiters_of(endpoint) return prefix .. 'waiters:' .. endpoint end

-- A user's limiter has the keys of a sender without jobs, under this id.
local function limiter_of(user) return 'u:' .. user end
local function user_of(id) return string.match(id, '^u:(.*)$') end

-- Returns the member of an entry that counts as used because the claim's lease expired unsettled.
local function assumed(member) return member .. '?' end
