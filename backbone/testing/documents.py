"""Implement documents in memory, for one process and for tests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from schemas.errors import Unavailable


class _Name(NamedTuple):
    kind: str
    owner: str
    id: str


class _StoredDocument(NamedTuple):
    value: bytes
    expires: float


class MemoryDocumentStore:
    """Documents by kind, owner and id: see `backbone.store.documents`. Gateways of one process share one instance.

    No method awaits anything between its first look and its last change: that makes each one atomic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create an empty store. `clock` returns seconds."""
        self.available = True
        """Set it to False to simulate an outage."""
        self._clock = clock
        self._documents: dict[_Name, _StoredDocument] = {}

    async def add(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> bool:
        if await self.get(kind, owner, doc_id) is not None:
            return False
        self._store(_Name(kind, owner, doc_id), value, ttl_s)
        return True

    async def put(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> None:
        self._require_available()
        self._store(_Name(kind, owner, doc_id), value, ttl_s)

    async def get(self, kind: str, owner: str, doc_id: str) -> bytes | None:
        self._require_available()
        document = self._documents.get(_Name(kind, owner, doc_id))
        return document.value if document is not None and self._clock() < document.expires else None

    async def swap(self, kind: str, owner: str, doc_id: str, old: bytes, new: bytes) -> bool:
        if await self.get(kind, owner, doc_id) != old:
            return False
        name = _Name(kind, owner, doc_id)
        self._documents[name] = self._documents[name]._replace(value=new)
        return True

    async def remove(self, kind: str, owner: str, doc_id: str) -> bool:
        found = await self.get(kind, owner, doc_id) is not None
        self._documents.pop(_Name(kind, owner, doc_id), None)
        return found

    async def page(
        self, kind: str, owner: str, *, after: str = "", limit: int = 100, newest_first: bool = True
    ) -> list[tuple[str, bytes]]:
        self._require_available()
        self._delete_expired()
        found = (
            (name.id, document.value)
            for name, document in self._documents.items()
            if (name.kind, name.owner) == (kind, owner) and _is_after(name.id, after, newest_first)
        )
        return sorted(found, reverse=newest_first)[: max(0, limit)]

    def _require_available(self) -> None:
        if not self.available:
            raise Unavailable("The memory store is away.")

    def _store(self, name: _Name, value: bytes, ttl_s: float | None) -> None:
        self._delete_expired()
        self._documents[name] = _StoredDocument(value, math.inf if ttl_s is None else self._clock() + ttl_s)

    def _delete_expired(self) -> None:
        now = self._clock()
        for name in [name for name, document in self._documents.items() if document.expires <= now]:
            del self._documents[name]


def _is_after(doc_id: str, after: str, newest_first: bool) -> bool:
    if not after:
        return True
    return doc_id < after if newest_first else doc_id > after
