"""Share one computation among concurrent callers, and cache its result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")


class CachedResult(Generic[T]):
    """Runs `make` at most once at a time, and returns its result until it is `max_age_s` old."""

    def __init__(self, make: Callable[[], Awaitable[T]], max_age_s: float) -> None:
        self._make = make
        self._max_age_s = max_age_s
        self._task: asyncio.Task[T] | None = None
        self._made_at = 0.0

    async def get(self) -> T:
        """Return the result. Raises what `make` raises; a failure is not cached."""
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
