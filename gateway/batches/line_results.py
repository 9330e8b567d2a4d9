"""Reserve room for the results of a batch's lines: they stay stored until the batch has ended, as its output is made of them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic

from backbone.store.byte_quotas import ByteQuotas
from gateway.jobs.storage_quotas import OVERHEAD_BYTES
from schemas.errors import Unavailable

FIRST_ESTIMATE_BYTES = 64 * 1024
"""Bytes of a line's result before any line of the batch has ended; then it is their mean."""
STEP_BYTES = 4 * 1024 * 1024
"""Bytes that are reserved ahead: the quotas are asked once for so many."""


class LineResults:
    """Reserves bytes of the owner for one batch. While Redis is away nothing is counted, and there is room."""

    def __init__(self, quotas: ByteQuotas, owner: str, batch: str, keep_s: float) -> None:
        """Begin with nothing. After `keep_s` seconds the reservation ends, whatever happens to the batch."""
        self._quotas = quotas
        self._owner = owner
        self._batch = batch
        self._keep_s = keep_s
        self._lock = asyncio.Lock()
        self._reserved = self._bytes = self._ended = 0
        self.open = 0
        """Lines with room whose jobs have not ended."""
        self.full_since: float | None = None
        """The time since which no line has got room, by the monotonic clock. None: there was room."""

    async def begin_line(self, most: int | None) -> bool:
        """Reserve room for one more line. False: the owner's batches would take more than `most` bytes."""
        if most is None:
            self.open += 1
            return True
        async with self._lock:
            has_room = await self._reserve(self._bytes + (self.open + 1) * self._estimate(), most)
            if has_room:
                self.open += 1
                self.full_since = None
            elif self.full_since is None:
                self.full_since = monotonic()
        return has_room

    def end_line(self, size: int) -> None:
        """Replace the estimate of a line by the size of its result."""
        self.open -= 1
        self._bytes += size
        self._ended += 1

    async def release(self) -> None:
        """Reserve nothing any more, as the batch has ended."""
        with suppress(Unavailable):
            await self._quotas.release(self._owner, self._batch)

    def _estimate(self) -> int:
        return max(OVERHEAD_BYTES, self._bytes // self._ended) if self._ended else FIRST_ESTIMATE_BYTES

    async def _reserve(self, wanted: int, most: int) -> bool:
        if wanted <= self._reserved <= wanted + 2 * STEP_BYTES:
            return True
        with suppress(Unavailable):
            for size in (wanted + STEP_BYTES, wanted):
                if await self._quotas.reserve(self._owner, self._batch, size, ttl_s=self._keep_s, most=most):
                    self._reserved = size
                    return True
            return False
        return True
