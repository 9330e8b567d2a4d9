"""Reads the values that a sorted list of ids names, page by page."""

from __future__ import annotations

from backbone.store import redis_scripts as scripts
from backbone.store.redis_connection import RedisConnection


class SortedSetPager:
    """Reads pages, and removes ids of expired values from the list, a thousand in one step at the most."""

    def __init__(self, connection: RedisConnection) -> None:
        """Read through `connection`, which its owner closes."""
        self._connection = connection
        self._page = connection.script(scripts.PAGE)

    async def read(
        self, index: str, prefix: str, *, after: str, limit: int, newest_first: bool = True
    ) -> list[tuple[str, bytes]]:
        """Return up to `limit` ids after `after`, with the values under `prefix`; fewer only at the end. Raises Unavailable."""
        return await self._connection.call(lambda: self._read(index, prefix, after, limit, newest_first))

    async def _read(
        self, index: str, prefix: str, after: str, limit: int, newest_first: bool
    ) -> list[tuple[str, bytes]]:
        found: list[tuple[str, bytes]] = []
        ended = limit <= 0
        last: str | bytes = after
        while not ended:
            args = [prefix, last, limit - len(found), int(newest_first)]
            ended, last, flat = await self._page([index], args)
            found += [(flat[at].decode(), flat[at + 1]) for at in range(0, len(flat), 2)]
        return found
