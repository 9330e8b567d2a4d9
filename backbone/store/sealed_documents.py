"""A document store in front of another one that encrypts the documents of teams with a key."""

from __future__ import annotations

from backbone.store.documents import DocumentStore
from backbone.team_keys import TeamKeys


class SealedDocumentStore:
    """Seals documents of some kinds, and opens all; see `backbone.store.documents`. Raises TeamKeyMissing too."""

    def __init__(self, inner: DocumentStore, keys: TeamKeys, kinds: frozenset[str]) -> None:
        self._inner = inner
        self._keys = keys
        self._kinds = kinds

    async def add(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> bool:
        return await self._inner.add(kind, owner, doc_id, self._seal(kind, owner, doc_id, value), ttl_s=ttl_s)

    async def put(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> None:
        await self._inner.put(kind, owner, doc_id, self._seal(kind, owner, doc_id, value), ttl_s=ttl_s)

    async def get(self, kind: str, owner: str, doc_id: str) -> bytes | None:
        raw = await self._inner.get(kind, owner, doc_id)
        return None if raw is None else self._keys.open(_name(kind, owner, doc_id), raw)

    async def swap(self, kind: str, owner: str, doc_id: str, old: bytes, new: bytes) -> bool:
        """Compare the opened document with `old`, and replace the stored bytes that were compared."""
        if kind not in self._kinds or not self._keys.has(owner):
            return await self._inner.swap(kind, owner, doc_id, old, new)
        raw = await self._inner.get(kind, owner, doc_id)
        if raw is None or self._keys.open(_name(kind, owner, doc_id), raw) != old:
            return False
        return await self._inner.swap(kind, owner, doc_id, raw, self._seal(kind, owner, doc_id, new))

    async def remove(self, kind: str, owner: str, doc_id: str) -> bool:
        return await self._inner.remove(kind, owner, doc_id)

    async def page(
        self, kind: str, owner: str, *, after: str = "", limit: int = 100, newest_first: bool = True
    ) -> list[tuple[str, bytes]]:
        found = await self._inner.page(kind, owner, after=after, limit=limit, newest_first=newest_first)
        return [(doc_id, self._keys.open(_name(kind, owner, doc_id), raw)) for doc_id, raw in found]

    def _seal(self, kind: str, owner: str, doc_id: str, value: bytes) -> bytes:
        return self._keys.seal(owner, _name(kind, owner, doc_id), value) if kind in self._kinds else value


def _name(kind: str, owner: str, doc_id: str) -> str:
    return f"document {kind} {owner} {doc_id}"
