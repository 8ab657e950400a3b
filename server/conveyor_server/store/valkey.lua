-- What the server of a ValkeyStore does in one call. ARGV: the call's name and the time after which it is not done any
-- more, as NAME@MILLISECONDS; the prefix of all keys; the call's own.
--
-- PREFIX:session:ID   hash of a session: at, head, body, owner, runtime, quotas. `at` is five numbers: epoch; seq; expires,
--                     when it is gone; due and kept, the times of the next two. Times are unix milliseconds.
-- PREFIX:quota:KEY    sorted set of the ids that count against a quota, by due: they are not gone before that.
-- PREFIX:ids:KEY      sorted set of the same ids, by name; of the first two quotas, which are "" and the model's.
--
-- Due is never after expires, and kept, when the server lets go of the hash by itself, never before it; so expires moves
-- without them, as long as it stays between. An id whose due has passed is looked at, and goes or is given another due.

local prefix = ARGV[2]
local HOUR = 3600000
-- Ids that one call looks at because their time has come.
local TRIMMED = 20000
local SWEPT = 5000

local function session_key(id) return prefix .. ':session:' .. id end
local function quota_key(key) return prefix .. ':quota:' .. key end
local function ids_key(key) return prefix .. ':ids:' .. key end

local function clock()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

local now = clock()

-- The numbers of a session, or nil where there is none (any more).
local function look(id, moment)
    local at = redis.call('HGET', session_key(id), 'at')
    if not at then return nil end
    local epoch, seq, expires, due, kept = string.match(at, '^(%d+) (%d+) (%d+) (%d+) (%d+)$')
    local found = {
        epoch = tonumber(epoch), seq = tonumber(seq), expires = tonumber(expires), due = tonumber(due), kept = tonumber(kept)
    }
    if found.expires <= (moment or now) then return nil end
    return found
end

local function text(found)
    return string.format('%.0f %.0f %.0f %.0f %.0f', found.epoch, found.seq, found.expires, found.due, found.kept)
end

local function set_due(id, due, quotas)
    for _, key in ipairs(quotas) do redis.call('ZADD', quota_key(key), due, id) end
end

-- Gives a session another expiry; `at` is left to the caller, unless the hash went: `kept` has passed then.
local function expire(id, found, expires, quotas)
    found.expires = expires
    if found.due and expires >= found.due and expires <= found.kept then return end
    found.due = expires
    found.kept = expires + math.floor(math.max(expires - now, 0) / 4) + HOUR
    quotas = quotas or cjson.decode(redis.call('HGET', session_key(id), 'quotas'))
    local kept = string.format('%.0f', found.kept)
    set_due(id, string.format('%.0f', expires), quotas)
    redis.call('PEXPIREAT', session_key(id), kept)
    -- Sets are let go of with the last that can be in them.
    local sets = {ids_key(quotas[1]), ids_key(quotas[2])}
    for _, key in ipairs(quotas) do sets[#sets + 1] = quota_key(key) end
    for _, set in ipairs(sets) do
        redis.call('PEXPIREAT', set, kept, 'NX')
        redis.call('PEXPIREAT', set, kept, 'GT')
    end
end

local function remove(id)
    local quotas = redis.call('HGET', session_key(id), 'quotas')
    if not quotas then return end
    quotas = cjson.decode(quotas)
    for place, key in ipairs(quotas) do
        redis.call('ZREM', quota_key(key), id)
        if place <= 2 then redis.call('ZREM', ids_key(key), id) end
    end
    redis.call('DEL', session_key(id))
end

local function is_one_of(key, quotas)
    for _, quota in ipairs(quotas) do
        if quota == key then return true end
    end
    return false
end

-- Looks at ids of a quota whose due has passed; returns how many of them are gone.
local function trim(key, moment, most)
    local gone = 0
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', quota_key(key), '-inf', string.format('%.0f', moment), 'LIMIT', 0, most)) do
        local found = look(id, moment)
        local quotas = found and cjson.decode(redis.call('HGET', session_key(id), 'quotas'))
        if found and is_one_of(key, quotas) then
            found.due = found.expires
            redis.call('HSET', session_key(id), 'at', text(found))
            set_due(id, string.format('%.0f', found.due), quotas)
        else
            -- Where there is one, it is another of that name, which counts elsewhere.
            if not found then remove(id) end
            -- Of a hash that the server has let go of, these are left.
            redis.call('ZREM', quota_key(key), id)
            redis.call('ZREM', ids_key(key), id)
            gone = gone + 1
        end
    end
    return gone
end

local trimmed = {}

local function count(key)
    if not trimmed[key] then
        trim(key, now, TRIMMED)
        trimmed[key] = true
    end
    return redis.call('ZCARD', quota_key(key))
end

local function add(id, epoch, seq, expires, owner, runtime, head, body, quotas)
    local found = {epoch = epoch, seq = seq}
    redis.call('ZADD', ids_key(quotas[1]), 0, id)
    redis.call('ZADD', ids_key(quotas[2]), 0, id)
    redis.call('HSET', session_key(id), 'head', head, 'body', body, 'owner', owner, 'runtime', runtime,
        'quotas', cjson.encode(quotas))
    expire(id, found, expires, quotas)
    redis.call('HSET', session_key(id), 'at', text(found))
end

local calls = {}

-- ARGV: JSON of [id, seq, expires, owner, runtime, bytes of head, bytes of body, [quota, ...], [[quota, most], ...],
-- epoch], and all heads and bodies. Returns of each 0: added, -1: there is one, or the place of the quota that is full.
function calls.create()
    local answers, blob, at = {}, ARGV[4], 1
    for index, new in ipairs(cjson.decode(ARGV[3])) do
        local id, seq, expires, owner, runtime, head_size, body_size, quotas, bounds, epoch = unpack(new)
        local head = string.sub(blob, at, at + head_size - 1)
        local body = string.sub(blob, at + head_size, at + head_size + body_size - 1)
        at = at + head_size + body_size
        local found = look(id)
        local answer = 0
        if found then
            local known = redis.call('HMGET', session_key(id), 'owner', 'head')
            if found.epoch ~= epoch or known[1] ~= owner or known[2] ~= head then answer = -1 end
        else
            for place, bound in ipairs(bounds) do
                if answer == 0 and count(bound[1]) >= bound[2] then answer = place end
            end
            if answer == 0 then
                remove(id)
                -- One that has expired already would count until it is trimmed.
                if expires > now then add(id, epoch, seq, expires, owner, runtime, head, body, quotas) end
            end
        end
        answers[index] = answer
    end
    return answers
end

-- A session as it is answered: 1, epoch, seq, expires, head, body, owner, runtime.
local function record(id, found, with_body)
    local fields = redis.call('HMGET', session_key(id), 'head', 'owner', 'runtime')
    local body = with_body and redis.call('HGET', session_key(id), 'body') or ''
    return {1, found.epoch, found.seq, found.expires, fields[1], body, fields[2], fields[3]}
end

-- ARGV: JSON of [id, owner, expires, max epoch, known epoch, min seq]. Returns of each a record, or {0}: there is none,
-- {2, epoch}: it is above, {3, seq}: it is behind.
function calls.take()
    local answers = {}
    for index, claim in ipairs(cjson.decode(ARGV[3])) do
        local id, owner, expires, max_epoch, known_epoch, min_seq = unpack(claim)
        local found = look(id)
        if not found then
            answers[index] = {0}
        elseif max_epoch > 0 and found.epoch > max_epoch then
            answers[index] = {2, found.epoch}
        elseif found.seq < min_seq then
            answers[index] = {3, found.seq}
        else
            local known = found.epoch == known_epoch
            found.epoch = found.epoch + 1
            redis.call('HSET', session_key(id), 'owner', owner)
            local answer = record(id, found, not known)
            expire(id, found, math.max(expires, 0))
            answer[4] = found.expires
            answers[index] = answer
            if found.kept > now then redis.call('HSET', session_key(id), 'at', text(found)) end
        end
    end
    return answers
end

-- ARGV: JSON of [id, epoch]. Returns of each a record, {0}: there is none, or {2, epoch}: it is another.
function calls.load()
    local answers = {}
    for index, wanted in ipairs(cjson.decode(ARGV[3])) do
        local id, epoch = unpack(wanted)
        local found = look(id)
        if not found then
            answers[index] = {0}
        elseif epoch ~= 0 and epoch ~= found.epoch then
            answers[index] = {2, found.epoch}
        else
            answers[index] = record(id, found, true)
        end
    end
    return answers
end

-- ARGV: ids, a line each; their epochs, seqs, expires and sizes as doubles, one column after the other; bodies; owner;
-- runtime; then positions (from 1) and heads, in turn. Returns a digit of each: see contract.Outcome.
function calls.put()
    local ids, numbers, bodies, owner, runtime = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
    local heads = {}
    for place = 8, #ARGV, 2 do heads[tonumber(ARGV[place])] = ARGV[place + 1] end
    local column = string.len(numbers) / 4
    local outcomes, index, at = {}, 0, 1
    for id in string.gmatch(ids, '[^\n]+') do
        local place = index * 8 + 1
        index = index + 1
        local size = struct.unpack('<d', numbers, place + 3 * column)
        local found = look(id)
        if not found then
            outcomes[index] = '2'
        elseif found.epoch ~= struct.unpack('<d', numbers, place) then
            outcomes[index] = '1'
        else
            outcomes[index] = '0'
            local seq, head = struct.unpack('<d', numbers, place + column), heads[index]
            if seq > found.seq or (head and seq == found.seq) then
                found.seq = seq
                expire(id, found, math.max(struct.unpack('<d', numbers, place + 2 * column), 0))
                if found.kept > now then
                    redis.call('HSET', session_key(id), 'at', text(found), 'body', string.sub(bodies, at, at + size - 1),
                        'owner', owner, 'runtime', runtime)
                    if head then redis.call('HSET', session_key(id), 'head', head) end
                end
            end
        end
        at = at + size
    end
    return table.concat(outcomes)
end

-- ARGV: JSON of [id, epoch]. Returns a digit of each: see contract.Outcome.
function calls.delete()
    local outcomes = {}
    for index, wanted in ipairs(cjson.decode(ARGV[3])) do
        local id, epoch = unpack(wanted)
        local found = look(id)
        if not found then
            outcomes[index] = '2'
        elseif found.epoch ~= epoch then
            outcomes[index] = '1'
        else
            remove(id)
            outcomes[index] = '0'
        end
    end
    return table.concat(outcomes)
end

-- ARGV: the id before the first, how many, quota, and the ids between which they are. Returns how many there are in all,
-- 1 where others follow, records.
function calls.listed()
    local after, limit, key = ARGV[3], tonumber(ARGV[4]), ARGV[5]
    local least, behind = ARGV[6], '(' .. ARGV[7]
    local total, more, answers = count(key), 0, {}
    if least ~= '' then total = redis.call('ZLEXCOUNT', ids_key(key), '(' .. least, behind) end
    local from = after == '' and '-' or '(' .. after
    repeat
        local ids = redis.call('ZRANGEBYLEX', ids_key(key), from, behind, 'LIMIT', 0, limit + 1)
        for _, id in ipairs(ids) do
            local found = look(id)
            if not found then
                redis.call('ZREM', ids_key(key), id)
            elseif #answers < limit then
                local answer = record(id, found, false)
                answer[1] = id
                answers[#answers + 1] = answer
            else
                more = 1
            end
            from = '(' .. id
        end
    until more == 1 or #ids <= limit
    return {total, more, answers}
end

function calls.count() return count('') end

-- ARGV: the moment.
function calls.sweep() return trim('', tonumber(ARGV[3]), SWEPT) end

-- Whoever asked has given up by then, and may have asked for the same elsewhere.
local name, not_after = string.match(ARGV[1], '^(%a+)@(%d+)$')
if now > tonumber(not_after) then return redis.error_reply('LATE the call came too late to be done') end
return calls[name]()
