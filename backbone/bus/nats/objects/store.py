"""Blobs in NATS's object store, over a connection of their own: a large transfer never delays a reply.

The layout is that of NATS's own clients (ADR-20), so that `nats object ls nexus-blobs` lists them. Every message carries its
own lifetime. Reading needs no consumer: each message is fetched by its subject.

A worker has few permissions: it writes below its own name, reads by exact subject, and empties a subject by overwriting it.
Gateways create the bucket, purge, and ask the stream's leader. Blobs are encrypted (`backbone.bus.blob_names`).
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from backbone.bus.blob_names import BlobName
from backbone.bus.blobs import BlobInfo
from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.jetstream import SETUP_BACKOFF, BlobBucketConfig, ensure_bucket
from backbone.bus.nats.objects.reader import NatsBlobReader
from backbone.bus.nats.objects.writer import (
    ERASE_HEADERS,
    MAX_UNCONFIRMED_TOTAL,
    NatsBlobWriter,
    erased_subjects,
    purge_requests,
)
from backbone.bus.nats.requests import RequestInbox
from backbone.bus.nats.write_probe import StorageHealth
from backbone.bus.subjects import require_token
from backbone.retry import retry
from schemas.errors import NexusError, Unavailable

log = structlog.get_logger(__name__)


class NatsBlobStore(NatsBlobReader):
    """A blob store on NATS; see backbone.bus.blobs.BlobStore."""

    def __init__(
        self,
        server: NatsAccess | str,
        name: str,
        *,
        create: BlobBucketConfig | None = None,
        worker: str = "",
        storage_health: StorageHealth | None = None,
    ) -> None:
        """Configure the store. A gateway passes `create`, the bucket to create; a worker passes its name, below which it
        writes.
        """
        if (create is None) is not bool(worker):
            raise ValueError("pass either `create`, as a gateway, or `worker`, as a worker")
        self._worker = require_token(worker) if worker else ""
        self._connection = NatsConnection(
            server, f"{name}-blobs", on_reconnect=self._reconnected, monitor_liveness=create is not None
        )
        super().__init__(RequestInbox(self._connection), may_ask_leader=create is not None)
        if storage_health is not None:
            self._inbox.require_storage = storage_health.require_available
        self._create = create
        self._unconfirmed_limit = asyncio.Semaphore(MAX_UNCONFIRMED_TOTAL)
        self._setup_task: asyncio.Task[None] | None = None
        self._erasing: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect, and create the bucket. Raises Unavailable, also for a server older than 2.11."""
        await self._connection.connect()
        await self._inbox.start()
        if self._create is not None:
            await ensure_bucket(self._inbox, self._create)

    async def close(self) -> None:
        """Disconnect; open writers and readers raise Unavailable."""
        tasks = [*self._erasing, *([self._setup_task] if self._setup_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.close()
        self._inbox.close()

    @property
    def connected(self) -> bool:
        """Whether the connection stands now."""
        return self._connection.connected

    async def _reconnected(self) -> None:
        self._inbox.forget_lost()
        if self._create is None:
            return
        if self._setup_task is not None:
            self._setup_task.cancel()
        self._setup_task = asyncio.create_task(self._make_bucket(self._create))

    async def _make_bucket(self, bucket: BlobBucketConfig) -> None:
        """Create a lost bucket again after a reconnect."""
        await retry(
            lambda: ensure_bucket(self._inbox, bucket),
            on=Unavailable,
            backoff=SETUP_BACKOFF,
            on_error=lambda error: log.warning("nats.setup_failed", part="blobs", error=str(error)),
        )

    def writer(
        self, *, ttl_s: float, content_type: str = "application/octet-stream", owner: str = ""
    ) -> NatsBlobWriter:
        may_purge = self._create is not None
        return NatsBlobWriter(
            self._inbox, self._unconfirmed_limit, ttl_s, content_type, owner, writer=self._worker, may_purge=may_purge
        )

    async def info(self, name: str) -> BlobInfo | None:
        meta = await self.meta(name)
        return meta.info if meta else None

    def remove(self, name: str, *, if_opened: bool = False) -> None:
        """Purge the blob's subjects without reading the replies, or erase them one by one."""
        parsed = BlobName.parse(name)
        if parsed is None:
            return
        if self._create is not None and not if_opened:
            self._purge(parsed.path)
            return
        task = asyncio.create_task(self._remove_opened(name))
        self._erasing.add(task)
        task.add_done_callback(self._erasing.discard)

    async def _remove_opened(self, name: str) -> None:
        """Remove the blob if the key in its name decrypts its metadata."""
        with contextlib.suppress(NexusError):
            meta = await self.meta(name)
            if meta is None or meta.seal is None:
                return
            if self._create is not None:
                self._purge(meta.path)
                return
            for subject in erased_subjects(meta.path, meta.chunks):
                self._inbox.request(subject, b"", headers=ERASE_HEADERS).cancel()

    def _purge(self, path: str) -> None:
        for subject, filter_ in purge_requests(path):
            with contextlib.suppress(Unavailable):
                self._connection.publish(subject, filter_, self._inbox.discard_subject)
