"""Shares of limits per minute on Redis (or Valkey): a count for each of the last 61 seconds of the clock.

A second of the clock counts until all of it is a minute old: else what was taken at its end would be free too early.
"""

from __future__ import annotations

from backbone.store import redis_keys as keys
from backbone.store.rates import RateShare
from backbone.store.redis import RedisStore

TAKE = """
local key = KEYS[1]
local limit, need, wanted, owed, unused = unpack(ARGV)
limit, need, wanted, owed, unused = tonumber(limit), tonumber(need), tonumber(wanted), tonumber(owed), tonumber(unused)
local time = redis.call('TIME')
local now, ms = tonumber(time[1]), math.floor(time[2] / 1000)
local used, counts, seconds = 0, {}, {}
local function add(second, count)
  if not counts[second] then
    counts[second] = 0
    table.insert(seconds, second)
  end
  counts[second] = counts[second] + count
  used = used + count
end
local stored = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
for i = 1, #stored, 2 do
  local second = tonumber(stored[i])
  if second > now then
    add(now, tonumber(stored[i + 1]))  -- the clock was set back
  elseif second >= now - 60 then
    add(second, tonumber(stored[i + 1]))
  end
end
table.sort(seconds)
for i = #seconds, 1, -1 do
  local back = math.min(unused, counts[seconds[i]])
  counts[seconds[i]] = counts[seconds[i]] - back
  used, unused = used - back, unused - back
end
local free, granted, wait = math.max(0, limit - used - owed), 0, 0
if free >= need then
  granted = math.min(wanted, math.max(need, math.floor(free / 2)))
else
  local freed = limit - used - owed
  wait = 61000
  for _, second in ipairs(seconds) do
    freed = freed + counts[second]
    if freed >= need then
      wait = (second + 61 - now) * 1000 - ms
      break
    end
  end
end
add(now, granted + owed)
redis.call('DEL', key)
local fields = {}
for second, count in pairs(counts) do
  if count > 0 then
    table.insert(fields, count)
    table.insert(fields, second)
  end
end
if #fields > 0 then
  redis.call('ZADD', key, unpack(fields))
  redis.call('PEXPIRE', key, 62000)
end
return {granted, math.max(0, limit - used), wait}
"""


class RedisRateStore:
    """Shares on Redis; see `backbone.store.rates`. It uses the connection of a RedisStore, which opens and closes it."""

    def __init__(self, store: RedisStore) -> None:
        """Share the store's connections, time-outs and circuit breaker."""
        self._connection = store.connection
        self._take = self._connection.script(TAKE)

    async def take(self, name: str, limit: int, *, need: int, wanted: int, owed: int = 0, unused: int = 0) -> RateShare:
        """Take a share in one atomic step; see `RateStore`."""
        args: list[str | bytes | int | float] = [limit, need, wanted, owed, unused]
        granted, free, wait_ms = await self._connection.run(self._take, [keys.rate(name)], args)
        return RateShare(int(granted), int(free), int(wait_ms) / 1000)
