"""Blobs in NATS's object store, over a connection of their own: a large transfer never holds up a reply.

The layout is that of NATS's own clients (ADR-20), so that `nats object ls nexus-blobs` shows what is there. Every message
carries its own lifetime. Reading takes no consumer: chunks are fetched by batched direct gets.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from backbone.bus.access import NatsAccess
from backbone.bus.blob_reading import BlobReader
from backbone.bus.blob_writing import MAX_UNDER_WAY, NatsBlobWriter, purges
from backbone.bus.blobs import BlobInfo
from backbone.bus.questions import Questions
from backbone.bus.streams import BucketConfig, ensure_bucket
from backbone.bus.subjects import is_blob_name
from backbone.bus.wire import Wire
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)


class NatsBlobs(BlobReader):
    """See backbone.bus.blobs.Blobs."""

    def __init__(self, server: NatsAccess | str, name: str, *, create: BucketConfig | None) -> None:
        """`create` makes the bucket, which is the gateways' part; None uses the one that is there."""
        self._wire = Wire(server, f"{name}-blobs", on_reconnect=self._reconnected)
        super().__init__(Questions(self._wire))
        self._create = create
        self._room = asyncio.Semaphore(MAX_UNDER_WAY)
        self._making: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect, and make the bucket. Raises Unavailable, also for a server older than 2.11."""
        await self._wire.connect()
        await self._questions.start()
        if self._create is not None:
            await ensure_bucket(self._wire.client, self._create)

    async def close(self) -> None:
        """Disconnect; whoever still reads or writes learns that."""
        if self._making is not None:
            self._making.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._making
        await self._wire.close()
        self._questions.close()

    @property
    def connected(self) -> bool:
        """Whether NATS can be talked to now."""
        return self._wire.connected

    async def _reconnected(self) -> None:
        self._questions.forget_lost()
        if self._create is None:
            return
        if self._making is not None:
            self._making.cancel()
        self._making = asyncio.create_task(self._make_bucket(self._create))

    async def _make_bucket(self, bucket: BucketConfig) -> None:
        """After a reconnect: the server may have lost its memory."""
        while True:
            try:
                await ensure_bucket(self._wire.client, bucket)
            except Unavailable as error:
                log.warning("store of blobs not ready after reconnect", error=str(error))
                await asyncio.sleep(0.5)
            else:
                return

    def writer(
        self, *, ttl_s: float, content_type: str = "application/octet-stream", owner: str = ""
    ) -> NatsBlobWriter:
        """Begin a blob."""
        return NatsBlobWriter(self._questions, self._room, ttl_s, content_type, owner)

    async def info(self, name: str) -> BlobInfo | None:
        """Read its meta."""
        meta = await self.meta(name)
        return meta.info if meta else None

    def remove(self, name: str) -> None:
        """Purge its subjects; the answers go nowhere."""
        if is_blob_name(name):
            for subject, filter_ in purges(name):
                with contextlib.suppress(Unavailable):
                    self._wire.publish(subject, filter_, self._questions.void)
