"""Documents on Redis (or Valkey): one string each, and a sorted list of ids for each kind and owner."""

from __future__ import annotations

from backbone.store import redis_keys as keys
from backbone.store import redis_scripts as scripts
from backbone.store.redis import RedisStore
from backbone.store.redis_pages import SortedSetPager


class RedisDocumentStore:
    """A document store on Redis; see `backbone.store.documents`. It uses the connection of a RedisStore, which opens and closes
    it.
    """

    def __init__(self, store: RedisStore) -> None:
        """Share the store's connections, time-outs and circuit breaker."""
        self._connection = store.connection
        register = self._connection.script
        self._write = register(scripts.WRITE)
        self._swap = register(scripts.SWAP)
        self._delete = register(scripts.DELETE)
        self._pages = SortedSetPager(self._connection)

    async def add(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> bool:
        return await self._written(kind, owner, doc_id, value, ttl_s, only_new=True)

    async def put(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> None:
        await self._written(kind, owner, doc_id, value, ttl_s, only_new=False)

    async def get(self, kind: str, owner: str, doc_id: str) -> bytes | None:
        key = keys.document(kind, owner, doc_id)
        return await self._connection.call(lambda: self._connection.get(key))

    async def swap(self, kind: str, owner: str, doc_id: str, old: bytes, new: bytes) -> bool:
        return bool(await self._connection.run(self._swap, [keys.document(kind, owner, doc_id)], [old, new]))

    async def remove(self, kind: str, owner: str, doc_id: str) -> bool:
        names = [keys.document(kind, owner, doc_id), keys.documents_of(kind, owner)]
        return bool(await self._connection.run(self._delete, names, [doc_id]))

    async def page(
        self, kind: str, owner: str, *, after: str = "", limit: int = 100, newest_first: bool = True
    ) -> list[tuple[str, bytes]]:
        index, prefix = keys.documents_of(kind, owner), keys.documents_prefix(kind, owner)
        return await self._pages.read(index, prefix, after=after, limit=limit, newest_first=newest_first)

    async def _written(
        self, kind: str, owner: str, doc_id: str, value: bytes, ttl_s: float | None, *, only_new: bool
    ) -> bool:
        prefix = keys.documents_prefix(kind, owner)
        lifetime = "" if ttl_s is None else max(1, round(ttl_s * 1000))
        names = [keys.document(kind, owner, doc_id), keys.documents_of(kind, owner)]
        return bool(await self._connection.run(self._write, names, [value, doc_id, lifetime, prefix, int(only_new)]))
