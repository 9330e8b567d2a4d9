"""Byte quotas on Redis (or Valkey): sorted sets of sizes and of ends for each owner."""

from __future__ import annotations

from backbone.store import redis_keys as keys
from backbone.store.redis import RedisStore

RESERVE = """
local sizes, ends = KEYS[1], KEYS[2]
local item, size, ttl, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local total = tonumber(redis.call('ZSCORE', sizes, '') or 0)
for _, ended in ipairs(redis.call('ZRANGEBYSCORE', ends, '-inf', now, 'LIMIT', 0, 1000)) do
  total = total - tonumber(redis.call('ZSCORE', sizes, ended) or 0)
  redis.call('ZREM', sizes, ended)
  redis.call('ZREM', ends, ended)
end
local before = tonumber(redis.call('ZSCORE', sizes, item) or 0)
local fits = size <= before or most == '' or total - before + size <= tonumber(most)
if fits then
  total = total - before + size
  if ttl > 0 then
    redis.call('ZADD', sizes, size, item)
    redis.call('ZADD', ends, now + ttl, item)
  else
    redis.call('ZREM', sizes, item)
    redis.call('ZREM', ends, item)
  end
end
if redis.call('ZCARD', ends) == 0 then
  redis.call('DEL', sizes)
else
  redis.call('ZADD', sizes, total, '')
end
return fits and 1 or 0
"""
"""The item with the empty name holds the sum. Scores are exact up to 2^53."""
OLDEST = """
local excess = tonumber(redis.call('ZSCORE', KEYS[1], '') or 0) - tonumber(ARGV[1])
local found = {}
if excess > 0 then
  for _, item in ipairs(redis.call('ZRANGE', KEYS[2], 0, tonumber(ARGV[2]) - 1)) do
    if excess <= 0 then break end
    excess = excess - tonumber(redis.call('ZSCORE', KEYS[1], item) or 0)
    found[#found + 1] = item
  end
end
return found
"""
"""Items that all have the same lifetime are in the order of their ends."""


class RedisByteQuotas:
    """Byte quotas on Redis; see `backbone.store.byte_quotas`. It uses the connection of a RedisStore, which opens and closes it."""

    def __init__(self, store: RedisStore, kind: str = "") -> None:
        """Share the store's connections, time-outs and circuit breaker. `kind`: of the items, each kind is counted for itself."""
        self._connection = store.connection
        self._kind = kind
        self._reserve = self._connection.script(RESERVE)
        self._oldest = self._connection.script(OLDEST)

    async def reserve(self, owner: str, item: str, size: int, *, ttl_s: float, most: int | None) -> bool:
        """Count an item in one atomic step; see `ByteQuotas`."""
        args: list[str | bytes | int | float] = [item, size, max(1, round(ttl_s * 1000)), "" if most is None else most]
        return bool(await self._connection.run(self._reserve, keys.stored_bytes(self._kind, owner), args))

    async def release(self, owner: str, item: str) -> None:
        """Count an item no more."""
        await self._connection.run(self._reserve, keys.stored_bytes(self._kind, owner), [item, 0, 0, ""])

    async def oldest(self, owner: str, most: int, count: int) -> list[str]:
        """Return the oldest items of an owner that has too many bytes."""
        args: list[str | bytes | int | float] = [most, count]
        return [
            item.decode()
            for item in await self._connection.run(self._oldest, keys.stored_bytes(self._kind, owner), args)
        ]
