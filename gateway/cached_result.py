"""A result that is made for everybody who wants it at the same time, and is given out again for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")


class CachedResult(Generic[T]):
    """However many callers ask, `make` runs once at a time, and not again before `max_age_s`."""

    def __init__(self, make: Callable[[], Awaitable[T]], max_age_s: float) -> None:
        self._make = make
        self._max_age_s = max_age_s
        self._task: asyncio.Task[T] | None = None
        self._made_at = 0.0

    async def get(self) -> T:
        """Raises what `make` raises; a failure is not given out again."""
        task = self._task
        if task is None or (task.done() and monotonic() - self._made_at >= self._max_age_s):
            task = self._task = asyncio.create_task(self._run())
        return await asyncio.shield(task)

    async def _run(self) -> T:
        try:
            made = await self._make()
        except BaseException:
            self._task = None
            raise
        self._made_at = monotonic()
        return made
