"""Implement byte quotas in memory, for tests."""

from __future__ import annotations

import time
from collections.abc import Callable


class MemoryByteQuotas:
    """Byte quotas in memory: see `backbone.store.byte_quotas`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin without items. `clock` returns seconds."""
        self._clock = clock
        self._items: dict[tuple[str, str], tuple[int, float]] = {}

    async def reserve(self, owner: str, item: str, size: int, *, ttl_s: float, most: int | None) -> bool:
        """Count an item; see `ByteQuotas`."""
        before = self._items.get((owner, item), (0, 0.0))[0]
        if size > before and most is not None and self.used(owner) - before + size > most:
            return False
        self._items[owner, item] = size, self._clock() + ttl_s
        return True

    async def release(self, owner: str, item: str) -> None:
        """Count an item no more."""
        self._items.pop((owner, item), None)

    async def oldest(self, owner: str, most: int, count: int) -> list[str]:
        """Return the items that end first; see `ByteQuotas`."""
        excess, found = self.used(owner) - most, []
        items = sorted((end, name, size) for (holder, name), (size, end) in self._items.items() if holder == owner)
        for _, name, size in items[:count]:
            if excess <= 0:
                break
            excess -= size
            found.append(name)
        return found

    def used(self, owner: str) -> int:
        """Return the bytes of an owner's items."""
        now = self._clock()
        self._items = {name: item for name, item in self._items.items() if item[1] > now}
        return sum(size for (holder, _), (size, _) in self._items.items() if holder == owner)
