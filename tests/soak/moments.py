"""Steps of a round, by which faults are timed: they are waited for as events."""

from __future__ import annotations

import asyncio
from collections import Counter


class Moments:
    """How often each step has been seen, and who waits for it."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._waiting: list[tuple[str, int, asyncio.Future[None]]] = []

    def happened(self, step: str) -> None:
        """One more."""
        self.seen[step] += 1
        for name, count, future in self._waiting:
            if name == step and self.seen[step] >= count and not future.done():
                future.set_result(None)

    async def reach(self, step: str, count: int) -> None:
        """Return when the step has been seen `count` times."""
        if self.seen[step] >= count:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((step, count, future))
        await future
