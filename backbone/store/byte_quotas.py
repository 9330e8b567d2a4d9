"""The protocol of byte quotas: how many bytes each owner has stored.

Guarantees of every implementation:
- `reserve` is atomic: of racing calls, those that fit succeed, and no others.
- An item counts until it is released or its lifetime is over.
- Each call ends within about two seconds: it raises Unavailable when the store is away, frozen or slow.
"""

from __future__ import annotations

from typing import Protocol


class ByteQuotas(Protocol):
    """Counts the bytes of owners' stored items."""

    async def reserve(self, owner: str, item: str, size: int, *, ttl_s: float, most: int | None) -> bool:
        """Count `size` bytes for an item, in place of what it counted before. False, without a change: the owner would have more than
        `most` bytes.
        """

    async def release(self, owner: str, item: str) -> None:
        """Count an item no more. Idempotent."""

    async def oldest(self, owner: str, most: int, count: int) -> list[str]:
        """Return the items that end first, so many that without them the owner has at most `most` bytes, and at most `count`.
        None where it has no more already.
        """
