"""Reads blobs from NATS's object store."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from hashlib import sha256

import orjson

from backbone.bus.blob_names import METADATA_NUMBER, BlobCipher, BlobName, InvalidBlobSeal
from backbone.bus.blobs import BlobCorrupted, BlobInfo, BlobNotFound
from backbone.bus.nats.requests import (
    NO_MESSAGE,
    NOT_FOUND,
    JetStreamError,
    ReplyMessage,
    RequestInbox,
    call_api_until_answered,
    request_until_answered,
)
from backbone.bus.subjects import BLOBS_STREAM, blob_chunk, blob_meta
from schemas.errors import NexusError, Unavailable

CHUNKS_PER_BATCH = 2
"""Chunks that are fetched together. One batch is yielded while the next one is fetched: a reader holds two."""
REPLICA_LAG_TIMEOUT_S = 3.0
"""The time that a replica gets to receive what its leader has, where this process may not read from the leader."""
REPLICA_RETRY_DELAY_S = 0.1
DIRECT_GET = f"$JS.API.DIRECT.GET.{BLOBS_STREAM}".encode()


@dataclass(frozen=True, slots=True)
class BlobMetadata:
    """The store's description of a blob."""

    info: BlobInfo
    path: str
    chunks: int
    seal: BlobCipher | None
    """None: the blob is not encrypted, and has a digest."""
    digest: str = ""

    def open(self, number: int, data: bytes) -> bytes:
        """Return the plain bytes of chunk `number`. Raises BlobCorrupted."""
        if self.seal is None:
            return data
        try:
            return self.seal.open(number, data)
        except InvalidBlobSeal as error:
            raise BlobCorrupted from error

    def check(self, size: int, digest: bytes) -> None:
        """Raise BlobCorrupted unless this is everything that was written."""
        if size != self.info.size or (self.seal is None and digest_text(digest) != self.digest):
            raise BlobCorrupted


def digest_text(digest: bytes) -> str:
    """Return a SHA-256 digest in the object store's notation."""
    return f"SHA-256={base64.urlsafe_b64encode(digest).decode()}"


class NatsBlobReader:
    """The reading half of backbone.bus.blobs.BlobStore.

    Every message is requested by its subject, so that a permission on subjects limits what can be read. Any replica answers
    such a request, and may lag behind. The stream's leader is asked for what a replica lacks, where that is allowed (such
    requests can also read by sequence, and so everything); else the replicas are asked again for a while.
    """

    def __init__(self, inbox: RequestInbox, *, may_ask_leader: bool) -> None:
        self._inbox = inbox
        self._may_ask_leader = may_ask_leader

    async def meta(self, name: str) -> BlobMetadata | None:
        """Return the metadata of a blob; None: it does not exist. Raises Unavailable and BlobCorrupted."""
        parsed = BlobName.parse(name)
        if parsed is None:
            return None
        data = await self._get(blob_meta(parsed.path))
        return _parse_meta(name, parsed, data) if data is not None else None

    async def read(self, name: str) -> AsyncGenerator[bytes, None]:
        """Fetch, verify and yield the chunks."""
        meta = await self.meta(name)
        if meta is None:
            raise BlobNotFound
        digest, size, at, end = sha256(), 0, 0, meta.chunks
        fetching = asyncio.create_task(self._fetch(meta, range(at, min(at + CHUNKS_PER_BATCH, end)))) if end else None
        try:
            while fetching is not None:
                chunks = deque(await fetching)
                at += len(chunks)
                # The next batch is fetched while this one is yielded.
                more = range(at, min(at + CHUNKS_PER_BATCH, end))
                fetching = asyncio.create_task(self._fetch(meta, more)) if more else None
                while chunks:
                    data = chunks.popleft()
                    if meta.seal is None:
                        digest.update(data)
                    size += len(data)
                    if at == end and not chunks:
                        meta.check(size, digest.digest())
                    yield data
            meta.check(size, digest.digest())
        finally:
            if fetching is not None:
                fetching.cancel()
                with contextlib.suppress(asyncio.CancelledError, NexusError):
                    await fetching

    async def _fetch(self, meta: BlobMetadata, numbers: range) -> list[bytes]:
        """Return these chunks. Raises BlobCorrupted when one is missing or damaged."""
        chunks = await asyncio.gather(*(self._get(blob_chunk(meta.path, number)) for number in numbers))
        found = [chunk for chunk in chunks if chunk is not None]
        if len(found) < len(chunks):
            raise BlobCorrupted
        return [meta.open(number, chunk) for number, chunk in zip(numbers, found, strict=True)]

    async def _get(self, subject: str) -> bytes | None:
        """Return the message on a subject; None when it holds none, or an erased one. Raises Unavailable."""
        until = time.monotonic() + REPLICA_LAG_TIMEOUT_S
        while True:
            answer = await self._get_direct(DIRECT_GET + b"." + subject.encode())
            if answer.status is None:
                return answer.data or None
            _require_not_found(answer)
            if self._may_ask_leader:
                return await self._read_from_leader(subject)
            if time.monotonic() > until:
                return None
            await asyncio.sleep(REPLICA_RETRY_DELAY_S)

    async def _get_direct(self, subject: bytes) -> ReplyMessage:
        return (await request_until_answered(self._inbox, subject, b""))[0]

    async def _read_from_leader(self, subject: str) -> bytes | None:
        try:
            response = await call_api_until_answered(
                self._inbox, f"STREAM.MSG.GET.{BLOBS_STREAM}", {"last_by_subj": subject}
            )
        except JetStreamError as error:
            if error.code == NO_MESSAGE:
                return None
            raise Unavailable(f"NATS cannot read a large payload: {error}") from error
        return base64.b64decode(response["message"].get("data", "")) or None


def _require_not_found(answer: ReplyMessage) -> None:
    status = answer.status
    if status is None or status.code not in NOT_FOUND:
        raise Unavailable(f"NATS cannot read a large payload: {status}")


def _parse_meta(text: str, name: BlobName, data: bytes) -> BlobMetadata | None:
    try:
        found = orjson.loads(data)
        if found.get("deleted"):
            return None
        if name.key is None:
            info = BlobInfo(
                name=text,
                size=found["size"],
                content_type=found["headers"]["Content-Type"][0],
                owner=found["metadata"]["owner"],
            )
            return BlobMetadata(info, name.path, int(found["chunks"]), None, str(found["digest"]))
        seal = BlobCipher(name.key)
        about = orjson.loads(seal.open(METADATA_NUMBER, base64.b64decode(found["metadata"]["sealed"])))
        chunks = int(about.pop("chunks"))
        return BlobMetadata(BlobInfo(name=text, **about), name.path, chunks, seal)
    except (InvalidBlobSeal, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BlobCorrupted from error
