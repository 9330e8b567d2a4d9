"""The Lua scripts of the store: each is one round trip and one atomic step.

They need Redis 7 or Valkey. They touch keys of several slots, some of which they derive themselves: a Redis Cluster cannot run
them.
"""

from __future__ import annotations

LISTS = """
local function quoted(id)  -- as urllib.parse.quote(id, safe='') does
  return (string.gsub(id, '[^%w_.~-]', function(c) return string.format('%%%02X', string.byte(c)) end))
end

-- List an id for `ms` milliseconds, or for good ('') in a list that lives as long as the longest of its entries. Return 1 if it is new.
local function list(key, id, ms)
  local was = redis.call('PTTL', key)  -- -2: there is no list, -1: it never expires
  local added = redis.call('ZADD', key, 0, id)
  if ms == '' then
    redis.call('PERSIST', key)
  elseif was ~= -1 and was < tonumber(ms) then
    redis.call('PEXPIRE', key, ms)
  end
  return added
end

-- Two entries chosen at random leave the list if what they name has expired: for each one that comes. So a list that
-- nobody reads holds about twice what lives at the most.
local function sweep(key, prefix)
  for _, id in ipairs(redis.call('ZRANDMEMBER', key, 2)) do
    if redis.call('EXISTS', prefix .. quoted(id)) == 0 then redis.call('ZREM', key, id) end
  end
end
"""

COUNTS = """
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Count a job until its record expires, in `ms` milliseconds: a record that nobody ends blocks no key forever.
local function count_in(key, member, ms, now)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  redis.call('ZADD', key, now + ms, member)
  if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, ms) end
end

local function counted(key, now)
  return redis.call('ZCOUNT', key, '(' .. string.format('%d', now), '+inf')
end

local function is_full(key, limit, now)
  return limit ~= '' and counted(key, now) >= tonumber(limit)
end
"""

CREATE = (
    LISTS
    + COUNTS
    + """
local record, index, timers, owners = unpack(KEYS)
local value, ttl, owner, id, member, prefix, of_key, of_owner, due, key_limit, owner_limit = unpack(ARGV)
if redis.call('EXISTS', record) == 1 then return 0 end
local now = now_ms()
if of_key ~= '' then
  if is_full(of_key, key_limit, now) then return -1 end
  if is_full(of_owner, owner_limit, now) then return -2 end
end
redis.call('SET', record, value, 'PX', ttl)
if id ~= '' then
  list(index, id, ttl)
  sweep(index, prefix)
  if list(owners, owner, ttl) == 1 then sweep(owners, 'nexus:jobs:') end
end
if of_key ~= '' then
  count_in(of_key, member, tonumber(ttl), now)
  count_in(of_owner, member, tonumber(ttl), now)
end
if due ~= '' then
  redis.call('ZADD', timers, now + due, member)
else
  redis.call('ZREM', timers, member)  -- of a record with this name that has expired
end
return 1
"""
)
"""1: created; 0: it exists; -1: the key's limit is reached; -2: the owner's."""

REPLACE = (
    COUNTS
    + """
local record, timers = KEYS[1], KEYS[2]
local old, new, member, was_key, is_key, was_owner, is_owner, due, key_limit, owner_limit = unpack(ARGV)
local current = redis.call('GET', record)
if current ~= old then return current end
if was_key ~= is_key and is_key ~= '' then
  local now = now_ms()
  if is_full(is_key, key_limit, now) then return -1 end
  if is_full(is_owner, owner_limit, now) then return -2 end
end
redis.call('SET', record, new, 'KEEPTTL')
if due == 'off' then
  redis.call('ZREM', timers, member)
elseif due ~= '' then
  redis.call('ZADD', timers, now_ms() + due, member)
end
for _, counts in ipairs({{was_key, is_key}, {was_owner, is_owner}}) do
  local was_in, is_in = counts[1], counts[2]
  if was_in ~= is_in then
    if was_in ~= '' then redis.call('ZREM', was_in, member) end
    if is_in ~= '' then count_in(is_in, member, redis.call('PTTL', record), now_ms()) end
  end
end
return 1
"""
)
"""Write the new record if the old one is still there, byte for byte, and return 1; else return the stored one, or nil. -1: the
key's limit is reached; -2: the owner's.
"""

REMOVE = """
local record, timers, index = KEYS[1], KEYS[2], KEYS[3]
local old, member, was_key, was_owner, id = unpack(ARGV)
local current = redis.call('GET', record)
if (current or '') ~= old then return current end
redis.call('DEL', record)
redis.call('ZREM', timers, member)
redis.call('ZREM', index, id)
if was_key ~= '' then redis.call('ZREM', was_key, member) end
if was_owner ~= '' then redis.call('ZREM', was_owner, member) end
return 1
"""
"""Like REPLACE. `old` is empty where there is no record; its remains are deleted."""

COUNT = COUNTS + "return counted(KEYS[1], now_ms())"

DUE = (
    COUNTS
    + """
local timers = KEYS[1]
local limit, again, prefix = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local now, given, looked = now_ms(), {}, 0
while #given < limit and looked < 1000 do
  local late = redis.call('ZRANGEBYSCORE', timers, '-inf', now, 'LIMIT', 0, math.min(limit - #given, 1000))
  if #late == 0 then break end
  for _, member in ipairs(late) do
    if redis.call('EXISTS', prefix .. member) == 1 then
      redis.call('ZADD', timers, now + again, member)
      table.insert(given, member)
    else
      redis.call('ZREM', timers, member)
    end
  end
  looked = looked + #late
end
return given
"""
)
"""Return a bounded number of jobs whose timers have expired, and delete the timers of expired records."""

LEASE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"

SERVED = """
local seconds = tonumber(ARGV[1])
local mean = tonumber(redis.call('GET', KEYS[1]) or '') or seconds
mean = mean + (seconds - mean) * ARGV[2]
redis.call('SET', KEYS[1], string.format('%.9g', mean), 'PX', ARGV[3])
"""

PAGE = (
    LISTS
    + """
local index = KEYS[1]
local prefix, after, limit, newest_first = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4] == '1'
local found, looked = {}, 0
while #found < 2 * limit and looked < 1000 do
  local wanted = math.min(limit - #found / 2, 1000 - looked)
  local bound = after == '' and (newest_first and '+' or '-') or '(' .. after
  local ids
  if newest_first then
    ids = redis.call('ZREVRANGEBYLEX', index, bound, '-', 'LIMIT', 0, wanted)
  else
    ids = redis.call('ZRANGEBYLEX', index, bound, '+', 'LIMIT', 0, wanted)
  end
  if #ids == 0 then return {1, after, found} end
  for _, id in ipairs(ids) do
    local value = redis.call('GET', prefix .. quoted(id))
    if value then
      table.insert(found, id)
      table.insert(found, value)
    else
      redis.call('ZREM', index, id)
    end
  end
  looked = looked + #ids
  after = ids[#ids]
end
return {#found < 2 * limit and 0 or 1, after, found}
"""
)
"""Return whether the page is complete, the last id that was read, and [id, value, id, value, ...]. Ids of expired values are
removed.
"""

WRITE = (
    LISTS
    + """
local value, id, ttl, prefix, only_new = unpack(ARGV)
if only_new == '1' and redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
if ttl == '' then
  redis.call('SET', KEYS[1], value)
else
  redis.call('SET', KEYS[1], value, 'PX', ttl)
end
list(KEYS[2], id, ttl)
sweep(KEYS[2], prefix)
return 1
"""
)

SWAP = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
return 1
"""

DELETE = """
redis.call('ZREM', KEYS[2], ARGV[1])
return redis.call('DEL', KEYS[1])
"""
