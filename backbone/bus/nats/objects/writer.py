"""Writes blobs to NATS's object store."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import time
from collections import deque
from datetime import UTC, datetime

import orjson

from backbone.bus.blob_names import METADATA_NUMBER, TAG_BYTES, BlobCipher, BlobName
from backbone.bus.blobs import CHUNK_BYTES, BlobInfo
from backbone.bus.nats.requests import ReplyFuture, ReplyMessage, RequestInbox
from backbone.bus.subjects import BLOBS_BUCKET, BLOBS_STREAM, blob_chunk, blob_chunks, blob_meta, blob_nuid
from schemas.errors import Unavailable

MAX_UNCONFIRMED_CHUNKS = 4
"""Unconfirmed chunks of one writer."""
MAX_UNCONFIRMED_TOTAL = 32
"""Unconfirmed chunks of all writers of one connection."""
ACK_TIMEOUT_S = 10.0
"""The writer fails if NATS does not confirm a chunk within this time."""
ABORT_TIMEOUT_S = 2.0
"""For each step of an abort; the lifetime of its messages ends what it leaves behind."""
CHUNK_TTL_MARGIN_S = 2
"""Chunks outlive their blob by this time, so that a blob never exists without them."""
NO_SPACE_CODES = frozenset({10002, 10023, 10047, 10077})
"""JetStream's codes for a full store."""
ERASE_HEADERS = b"NATS/1.0\r\nNats-TTL: 1s\r\n\r\n"
"""An empty message with it replaces the one on a subject, which holds one message: a writer can erase a message without the
permission to purge.
"""
PURGE = f"$JS.API.STREAM.PURGE.{BLOBS_STREAM}".encode()


def purge_requests(path: str) -> list[tuple[bytes, bytes]]:
    """Return the requests, as subject and body, that delete a blob."""
    return [(PURGE, orjson.dumps({"filter": subject})) for subject in (blob_meta(path), blob_chunks(path))]


def erased_subjects(path: str, chunks: int) -> list[bytes]:
    """Return the subjects of a blob's metadata and chunks, metadata first."""
    return [blob_meta(path).encode(), *(blob_chunk(path, number).encode() for number in range(chunks))]


def sealed_info(seal: BlobCipher, info: BlobInfo, chunks: int) -> str:
    """Return the part of the metadata that only the key decrypts."""
    about = {"size": info.size, "chunks": chunks, "content_type": info.content_type, "owner": info.owner}
    return base64.b64encode(seal.seal(METADATA_NUMBER, orjson.dumps(about))).decode()


class NatsBlobWriter:
    """Writes one blob; see backbone.bus.blobs.BlobWriter."""

    def __init__(
        self,
        inbox: RequestInbox,
        unconfirmed_limit: asyncio.Semaphore,
        ttl_s: float,
        content_type: str,
        owner: str,
        *,
        writer: str,
        may_purge: bool,
    ) -> None:
        """Configure the writer. `writer` is the name of the worker that writes; empty: a gateway."""
        name = BlobName.new(writer)
        self.name = str(name)
        self._path = name.path
        self._seal = BlobCipher(name.key or b"")
        self._inbox = inbox
        self._unconfirmed_limit = unconfirmed_limit
        self._ttl_s = max(1, math.ceil(ttl_s))
        self._content_type = content_type
        self._owner = owner
        self._may_purge = may_purge
        self._unsent = bytearray()
        self._unconfirmed: deque[ReplyFuture] = deque()
        self._began = 0.0
        self._size = self._count = self._last_seq = 0
        self._error: Unavailable | None = None
        self._info: BlobInfo | None = None
        self._aborted = False

    async def write(self, data: bytes) -> None:
        """Send full chunks, and keep the rest."""
        self._require_open()
        view = memoryview(data)
        while view:
            if not self._unsent and len(view) >= CHUNK_BYTES:
                chunk, view = view[:CHUNK_BYTES], view[CHUNK_BYTES:]
                await self._send(chunk)
                continue
            unconfirmed_limit = CHUNK_BYTES - len(self._unsent)
            self._unsent += view[:unconfirmed_limit]
            view = view[unconfirmed_limit:]
            if len(self._unsent) == CHUNK_BYTES:
                await self._send_unsent()

    async def close(self) -> BlobInfo:
        """Send the rest, and the metadata last, once every chunk is confirmed."""
        if self._info is not None:
            return self._info
        self._require_open()
        if self._unsent:
            await self._send_unsent()
        while self._unconfirmed:
            await self._confirm_one()
        self._began = self._began or time.monotonic()
        age = int(time.monotonic() - self._began)
        if age >= self._ttl_s:
            raise self._fail(f"writing took longer than the lifetime of the content, {self._ttl_s} s")
        info = BlobInfo(name=self.name, size=self._size, content_type=self._content_type, owner=self._owner)
        await self._publish(blob_meta(self._path).encode(), self._meta(info), self._ttl_s - age)
        await self._confirm_one()
        self._info = info
        return info

    async def abort(self) -> None:
        """Delete the blob once its chunks have arrived: NATS may process a deletion before an earlier write."""
        self._unsent = bytearray()
        if self._aborted or not self._began or not self._inbox.connected:
            self._aborted = True
            return
        self._aborted = True
        await _wait_briefly(list(self._unconfirmed))
        with contextlib.suppress(Unavailable):
            if self._may_purge:
                await _wait_briefly(
                    [self._inbox.request(subject, body) for subject, body in purge_requests(self._path)]
                )
            else:
                subjects = erased_subjects(self._path, self._count)
                await _wait_briefly([self._inbox.request(subject, b"", headers=ERASE_HEADERS) for subject in subjects])

    def _require_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._info is not None or self._aborted:
            raise RuntimeError("the blob is already closed or aborted")

    def _fail(self, message: str) -> Unavailable:
        self._error = Unavailable(message)
        return self._error

    async def _send_unsent(self) -> None:
        chunk, self._unsent = memoryview(self._unsent), bytearray()
        await self._send(chunk)

    async def _send(self, chunk: memoryview) -> None:
        while len(self._unconfirmed) >= MAX_UNCONFIRMED_CHUNKS:
            await self._confirm_one()
        self._began = self._began or time.monotonic()
        number, sealed = self._count, self._seal.seal(self._count, chunk)
        self._size += len(chunk)
        self._count += 1
        await self._publish(blob_chunk(self._path, number).encode(), sealed, self._ttl_s + CHUNK_TTL_MARGIN_S)

    async def _publish(self, subject: bytes, payload: bytes | memoryview, ttl_s: int) -> None:
        try:
            self._inbox.require_storage()
        except Unavailable as error:
            raise self._fail(str(error)) from error
        try:
            async with asyncio.timeout(ACK_TIMEOUT_S):
                await self._unconfirmed_limit.acquire()
        except TimeoutError:
            raise self._fail("NATS does not store large payloads fast enough; retry shortly") from None
        try:
            reply = self._inbox.request(subject, payload, headers=b"NATS/1.0\r\nNats-TTL: %ds\r\n\r\n" % ttl_s)
        except Unavailable as error:
            self._unconfirmed_limit.release()
            raise self._fail(str(error)) from error
        reply.add_done_callback(lambda _: self._unconfirmed_limit.release())
        self._unconfirmed.append(reply)

    async def _confirm_one(self) -> None:
        """Wait for the oldest confirmation. When this is cancelled, the confirmation stays pending for `abort`."""
        reply = self._unconfirmed[0]
        await asyncio.wait((reply,), timeout=ACK_TIMEOUT_S)
        if not reply.done():
            reply.cancel()
            raise self._fail(f"NATS did not confirm a large payload within {ACK_TIMEOUT_S:g} s; retry shortly")
        self._unconfirmed.popleft()
        answers = reply.result()
        if answers is None:
            raise self._fail("the connection to NATS was lost while a large payload was stored; retry shortly")
        seq = self._stored_as(answers[0])
        if seq <= self._last_seq:
            # The server read the rest of the old connection after data of the new one.
            raise self._fail("NATS stored the chunks of a large payload out of order; retry shortly")
        self._last_seq = seq

    def _stored_as(self, answer: ReplyMessage) -> int:
        if answer.status is not None:
            raise self._fail("NATS has no store for large payloads yet; a gateway creates it when it starts")
        ack = orjson.loads(answer.data)
        error = ack.get("error")
        if error is None:
            return int(ack["seq"])
        text = error.get("description")
        if error.get("err_code") in NO_SPACE_CODES:
            raise self._fail(
                f"the store for large payloads is full ({text}). It empties as results are fetched or expire: "
                "retry later, or raise MAX_BLOB_BYTES"
            )
        raise self._fail(f"NATS cannot store a large payload: {text}")

    def _meta(self, info: BlobInfo) -> bytes:
        """Return the metadata in the object store's format; the part about the content is encrypted."""
        return orjson.dumps(
            {
                "name": self._path.rpartition(".")[2],
                "bucket": BLOBS_BUCKET,
                "nuid": blob_nuid(self._path),
                "size": info.size + TAG_BYTES * self._count,
                "chunks": self._count,
                "mtime": datetime.now(UTC).isoformat(),
                "options": {"max_chunk_size": CHUNK_BYTES + TAG_BYTES},
                "metadata": {"sealed": sealed_info(self._seal, info, self._count)},
            }
        )


async def _wait_briefly(replies: list[ReplyFuture]) -> None:
    """Wait for the replies for a while, and drop those that are missing."""
    if replies:
        await asyncio.wait(replies, timeout=ABORT_TIMEOUT_S)
        for reply in replies:
            reply.cancel()
