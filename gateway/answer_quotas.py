"""Bound what the answers of synchronous requests keep stored for each owner: results behind URLs, and large answers that are being sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import structlog

from backbone.bus.blobs import BlobStore
from backbone.store.byte_quotas import ByteQuotas
from gateway.http.body_storage import BodyStorageFull, stored_item
from gateway.signed_urls import url_blobs
from schemas.errors import Unavailable
from schemas.frames import BlobRef

log = structlog.get_logger(__name__)

MAX_DROPPED = 64
"""Results that are deleted for one answer at most; the next one goes on."""
OVERHEAD_BYTES = 1024
"""Bytes that a stored result takes beside its content."""


class AnswerQuotas:
    """Counts stored answers by owner. While Redis or NATS is away nothing is counted: a request never fails because of that."""

    def __init__(self, urls: ByteQuotas, bodies: ByteQuotas, blobs: BlobStore, *, url_keep_s: float) -> None:
        """`urls` counts results behind URLs, which are stored for `url_keep_s`; `bodies` what is stored of open requests."""
        self._urls = urls
        self._bodies = bodies
        self._blobs = blobs
        self._keep_s = url_keep_s
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Do nothing: there is nothing to open."""

    async def close(self) -> None:
        """Cancel what is not counted yet."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def count_urls(self, owner: str, most: int | None, answer: bytes) -> None:
        """Count the results to which a worker's answer leads, and delete the owner's oldest above `most` bytes. Nobody waits for it."""
        if most is None or not (names := url_blobs(answer)):
            return
        task = asyncio.create_task(self._count_urls(owner, most, names))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _count_urls(self, owner: str, most: int, names: list[str]) -> None:
        with suppress(Unavailable):
            for name in names:
                info = await self._blobs.info(name)
                if info is not None and info.owner == owner:  # a worker may name any blob
                    size = OVERHEAD_BYTES + info.size
                    await self._urls.reserve(owner, stored_item(name), size, ttl_s=self._keep_s, most=None)
            oldest = await self._urls.oldest(owner, most, MAX_DROPPED)
            for item in oldest:
                self._blobs.remove(item)
                await self._urls.release(owner, item)
            if oldest:
                log.warning("result_urls.dropped", owner=owner, results=len(oldest), max_bytes=most)

    @asynccontextmanager
    async def sending(self, owner: str, most: int | None, ref: BlobRef) -> AsyncGenerator[None]:
        """Count a large answer as long as it is sent. Raises BodyStorageFull before that."""
        if most is None:
            yield
            return
        item = stored_item(ref.name)
        with suppress(Unavailable):
            if not await self._bodies.reserve(owner, item, ref.size, ttl_s=self._keep_s, most=most):
                raise BodyStorageFull(
                    f"Your team's large request bodies in flight and large answers that it has not read take {most} bytes, its limit. "
                    "Read the answers, or retry when some of the requests have ended."
                )
        try:
            yield
        finally:
            with suppress(Unavailable):
                await self._bodies.release(owner, item)
