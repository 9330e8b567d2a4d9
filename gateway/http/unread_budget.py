"""Bound the memory of unread answers, over all callers of one process."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import structlog

log = structlog.get_logger(__name__)


class UnreadBuffer(Protocol):
    """Buffers bytes until a caller reads them."""

    @property
    def owner(self) -> str:
        """The owner of the caller's key, or the caller's address if no key is known."""

    def shed(self) -> None:
        """Drop the bytes, and end their answer."""


class UnreadBudget:
    """Counts unread bytes. Beyond the limit, it ends answers of the owner with the most unread bytes, the largest first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sizes: dict[UnreadBuffer, tuple[str, int]] = {}
        self._by_owner: Counter[str] = Counter()
        self.total = 0
        """Unread bytes now."""
        self.shed = 0
        """Answers that were ended since the start."""

    def record(self, buffer: UnreadBuffer, size: int) -> None:
        """Record that `buffer` stores `size` bytes from now on. May call `shed`, also of `buffer` itself."""
        self._set(buffer, size)
        while self.total > self._limit:
            owner = max(self._by_owner, key=self._by_owner.__getitem__)
            worst = max((h for h, (o, _) in self._sizes.items() if o == owner), key=lambda h: self._sizes[h][1])
            self._set(worst, 0)
            self.shed += 1
            worst.shed()

    def _set(self, buffer: UnreadBuffer, size: int) -> None:
        owner, before = self._sizes.pop(buffer, ("", 0))
        if before:
            self._by_owner[owner] -= before
            if not self._by_owner[owner]:
                del self._by_owner[owner]
        if size > 0:
            owner = buffer.owner
            self._sizes[buffer] = (owner, size)
            self._by_owner[owner] += size
        self.total += max(0, size) - before
