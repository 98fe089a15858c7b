-- Returns open circuits of senders and endpoints.
--
-- KEYS[1] ready
-- ARGV    queries, as kind, id: `sender` for the circuits that delay a sender, `endpoint` for the
--         circuit of an endpoint or, if all its failures belong to one sender, of that sender
-- Returns an array of circuits per query: sender or '', open since (ms), next probe (ms), reason
--!include keys
--!include time
--!include run
--!include life
--!include circuit

local function open_circuit(key, sender, next_field)
    local f = redis.call('HMGET', key, 'open', next_field, 'reason', 'life')
    return f[1] and f[4] == LIFE and { sender, f[1], f[2], f[3] or '' } or nil
end

local function of_sender(id) return open_circuit(settings_of(id), id, 'probe') end
local function of_endpoint(id) return open_circuit(circuit_of(id), '', 'next') end

local answers = {}
for i = 1, #ARGV, 2 do
    local id, found = ARGV[i + 1], {}
    if ARGV[i] == 'sender' then
        local endpoint = redis.call('HGET', settings_of(id), 'endpoint') or ''
        found[1] = of_endpoint(endpoint)
        local shared = shared_of(endpoint)
        if shared then found[#found + 1] = of_endpoint(shared) end
        found[#found + 1] = of_sender(id)
    else
        local by = redis.call('HGET', circuit_of(id), 'by')
        found[1] = of_endpoint(id) or (by and by ~= SEVERAL and of_sender(by)) or nil
    end
    answers[#answers + 1] = found
end
return answers
