"""Documents without a server: for one process and for tests."""

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


class _Held(NamedTuple):
    value: bytes
    expires: float


class MemoryDocumentStore:
    """See `backbone.store.documents`. Gateways of one process share one instance.

    No method waits between its first look and its last change: that makes each one atomic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin empty. `clock` counts seconds."""
        self.available = True
        """Set to False and True again for an outage."""
        self._clock = clock
        self._held: dict[_Name, _Held] = {}

    async def add(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> bool:
        """See the base."""
        if await self.get(kind, owner, doc_id) is not None:
            return False
        self._hold(_Name(kind, owner, doc_id), value, ttl_s)
        return True

    async def put(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> None:
        """See the base."""
        self._answer()
        self._hold(_Name(kind, owner, doc_id), value, ttl_s)

    async def get(self, kind: str, owner: str, doc_id: str) -> bytes | None:
        """See the base."""
        self._answer()
        held = self._held.get(_Name(kind, owner, doc_id))
        return held.value if held is not None and self._clock() < held.expires else None

    async def swap(self, kind: str, owner: str, doc_id: str, old: bytes, new: bytes) -> bool:
        """See the base."""
        if await self.get(kind, owner, doc_id) != old:
            return False
        name = _Name(kind, owner, doc_id)
        self._held[name] = self._held[name]._replace(value=new)
        return True

    async def remove(self, kind: str, owner: str, doc_id: str) -> bool:
        """See the base."""
        there = await self.get(kind, owner, doc_id) is not None
        self._held.pop(_Name(kind, owner, doc_id), None)
        return there

    async def page(
        self, kind: str, owner: str, *, after: str = "", limit: int = 100, newest_first: bool = True
    ) -> list[tuple[str, bytes]]:
        """See the base."""
        self._answer()
        self._forget_expired()
        found = (
            (name.id, held.value)
            for name, held in self._held.items()
            if (name.kind, name.owner) == (kind, owner) and _behind(name.id, after, newest_first)
        )
        return sorted(found, reverse=newest_first)[: max(0, limit)]

    def _answer(self) -> None:
        if not self.available:
            raise Unavailable("the store is away")

    def _hold(self, name: _Name, value: bytes, ttl_s: float | None) -> None:
        self._forget_expired()
        self._held[name] = _Held(value, math.inf if ttl_s is None else self._clock() + ttl_s)

    def _forget_expired(self) -> None:
        now = self._clock()
        for name in [name for name, held in self._held.items() if held.expires <= now]:
            del self._held[name]


def _behind(doc_id: str, after: str, newest_first: bool) -> bool:
    if not after:
        return True
    return doc_id < after if newest_first else doc_id > after
