"""The documents seam: small JSON values of many kinds, each belonging to an owner.

Guarantees, for every implementation:
- A document belongs to a kind and an owner: another owner's does not exist.
- `add` and `swap` are atomic: of two racing calls exactly one succeeds.
- `page` lists by id; ids of one kind sort by the time they were made (`backbone.ids`).
- Each call ends within about two seconds: it raises Unavailable when the store is away, frozen or slow.
"""

from __future__ import annotations

from typing import Protocol


class DocumentStore(Protocol):
    """See the module's docstring. `value` is JSON, kept byte for byte."""

    async def add(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> bool:
        """Store a new document, for `ttl_s` seconds or for good. False, and no change, when it exists."""

    async def put(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> None:
        """Store a document, replacing what is there; the lifetime begins anew."""

    async def get(self, kind: str, owner: str, doc_id: str) -> bytes | None:
        """The document, or None."""

    async def swap(self, kind: str, owner: str, doc_id: str, old: bytes, new: bytes) -> bool:
        """Replace it if it is `old`, byte for byte; the lifetime stays. False, and no change, when it is not."""

    async def remove(self, kind: str, owner: str, doc_id: str) -> bool:
        """Delete it. False when it was not there."""

    async def page(
        self, kind: str, owner: str, *, after: str = "", limit: int = 100, newest_first: bool = True
    ) -> list[tuple[str, bytes]]:
        """Up to `limit` (id, value) in the order of ids, beginning behind `after`, which need not exist any more."""
