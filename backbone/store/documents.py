"""The document store protocol: small JSON values of many kinds, each belonging to an owner.

Guarantees of every implementation:
- A document belongs to a kind and an owner: another owner's document does not exist.
- `add` and `swap` are atomic: of two racing calls exactly one succeeds.
- `page` lists by id; ids of one kind sort by the time they were made (`backbone.ids`).
- Each call ends within about two seconds: it raises Unavailable when the store is away, frozen or slow.
"""

from __future__ import annotations

from typing import Protocol


class DocumentStore(Protocol):
    """Stores documents. A `value` is JSON, preserved byte for byte."""

    async def add(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> bool:
        """Store a new document, for `ttl_s` seconds or without a limit. False, without a change: it exists."""

    async def put(self, kind: str, owner: str, doc_id: str, value: bytes, *, ttl_s: float | None = None) -> None:
        """Store a document, or replace the existing one; its lifetime begins again."""

    async def get(self, kind: str, owner: str, doc_id: str) -> bytes | None:
        """Return the document; None: it does not exist."""

    async def swap(self, kind: str, owner: str, doc_id: str, old: bytes, new: bytes) -> bool:
        """Replace the document if it equals `old`, byte for byte; the lifetime stays. False, without a change: it does not."""

    async def remove(self, kind: str, owner: str, doc_id: str) -> bool:
        """Delete the document. False: it did not exist."""

    async def page(
        self, kind: str, owner: str, *, after: str = "", limit: int = 100, newest_first: bool = True
    ) -> list[tuple[str, bytes]]:
        """Return up to `limit` (id, value) in the order of ids, after the id `after`, which need not exist any more."""
