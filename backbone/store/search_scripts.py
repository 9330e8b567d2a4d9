"""The Lua scripts that search job records. Each looks at a bounded number of them, so that other calls never wait long."""

from __future__ import annotations

from backbone.store.redis_scripts import LISTS

CONDITIONS = """
local position = 0
local function argument()
  position = position + 1
  return ARGV[position]
end
local function count() return tonumber(argument()) end

local function read_conditions()
  local groups, ranges = {}, {}
  for i = 1, count() do
    local texts = {}
    for j = 1, count() do texts[j] = argument() end
    groups[i] = texts
  end
  for i = 1, count() do
    local range = {}
    range.name, range.since = argument(), argument()
    range.least, range.most = count(), count()  -- nil: no bound
    ranges[i] = range
  end
  return groups, ranges
end

local find, match = string.find, string.match

-- Callers may have written the same name into the metadata, with a text behind it.
local function number_of(value, name)
  local _, last = find(value, name, 1, true)
  while last do
    local digits = match(value, '^%d+', last + 1)
    if digits then return tonumber(digits) end
    _, last = find(value, name, last, true)
  end
end

local function holds_one(value, texts)
  for _, text in ipairs(texts) do
    if find(value, text, 1, true) then return true end
  end
  return false
end

local function is_candidate(value, groups, ranges)
  for _, texts in ipairs(groups) do
    if not holds_one(value, texts) then return false end
  end
  for _, range in ipairs(ranges) do
    local number = number_of(value, range.name)
    if not number then return false end
    if range.since ~= '' then
      local start = number_of(value, range.since)
      if not start then return false end
      number = number - start
    end
    if (range.least and number < range.least) or (range.most and number > range.most) then return false end
  end
  return true
end
"""

SEARCH = (
    LISTS
    + CONDITIONS
    + """
local groups, ranges = read_conditions()
local newest_first = argument() == '1'
local from, to = argument(), argument()
local step, room = count(), count()
local prefixes = {}
for i = 1, #KEYS do prefixes[i] = argument() end

local function is_beyond(id, bound)
  if newest_first then return id < bound end
  return id > bound
end

local function key_of(prefix, id)
  if find(id, '[^%w_]') then id = quoted(id) end
  return prefix .. id
end

local command = newest_first and 'ZREVRANGEBYLEX' or 'ZRANGEBYLEX'
local each = math.max(8, math.ceil(step / #KEYS))
local ids, list_of, left = {}, nil, {}
if #KEYS == 1 then
  ids = redis.call(command, KEYS[1], from, to, 'LIMIT', 0, each)
  left[1] = #ids == each and #ids + 1 or #ids
else
  -- The ids of all lists in one order, up to the nearest end of a list that goes on: its next ids are unknown.
  local bound
  list_of = {}
  for i, index in ipairs(KEYS) do
    local some = redis.call(command, index, from, to, 'LIMIT', 0, each)
    for _, id in ipairs(some) do
      ids[#ids + 1] = id
      list_of[id] = i
    end
    left[i] = #some
    if #some == each then
      if not bound or is_beyond(bound, some[each]) then bound = some[each] end
      left[i] = #some + 1
    end
  end
  table.sort(ids, function(a, b) return is_beyond(b, a) end)
  while bound and is_beyond(ids[#ids], bound) do ids[#ids] = nil end
end

local found, last = {}, ''
for first = 1, #ids, 500 do
  local names, most = {}, math.min(first + 499, #ids)
  for i = first, most do
    names[i - first + 1] = key_of(prefixes[list_of and list_of[ids[i]] or 1], ids[i])
  end
  local values = redis.call('MGET', unpack(names))
  for i = first, most do
    local value, at = values[i - first + 1], list_of and list_of[ids[i]] or 1
    last, left[at] = ids[i], left[at] - 1
    if not value then
      redis.call('ZREM', KEYS[at], last)
    elseif is_candidate(value, groups, ranges) then
      found[#found + 1] = last
      found[#found + 1] = value
    end
    if #found >= 2 * room then break end
  end
  if #found >= 2 * room then break end
end
local open = {}
for i = 1, #KEYS do
  if left[i] > 0 then open[#open + 1] = i - 1 end
end
return {last, open, found}
"""
)
"""Return the last id that was looked at, the numbers of the lists that go on behind it, and [id, record, id, record, ...] of
candidates. Ids of expired records leave the lists.
"""

SELECT = (
    CONDITIONS
    + """
local groups, ranges = read_conditions()
local found = {}
for i, value in ipairs(redis.call('MGET', unpack(KEYS))) do
  if value and is_candidate(value, groups, ranges) then
    found[#found + 1] = i - 1
    found[#found + 1] = value
  end
end
return found
"""
)
"""Return [number, record, number, record, ...] of the candidates among the records that the keys name."""
