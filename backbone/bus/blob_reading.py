"""Reading a blob from NATS."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import orjson

from backbone.bus.asking import ask
from backbone.bus.blob_writing import digest_text
from backbone.bus.blobs import BlobBroken, BlobGone, BlobInfo
from backbone.bus.questions import Answer, Questions
from backbone.bus.subjects import BLOBS_STREAM, blob_chunk, blob_meta, is_blob_name
from schemas.errors import NexusError, Unavailable

BATCH = 2
"""Chunks fetched at once. One batch is given out while the next one comes: a reader holds two."""
LAG_S = 3.0
"""For a replica to get what its leader has, where the leader may not be asked."""
LAG_AGAIN_S = 0.1
DIRECT_GET = f"$JS.API.DIRECT.GET.{BLOBS_STREAM}".encode()
LEADER_GET = f"$JS.API.STREAM.MSG.GET.{BLOBS_STREAM}".encode()
NO_MESSAGE = 10037
NOT_FOUND = 404


@dataclass(frozen=True, slots=True)
class Meta:
    """What the store says about a blob."""

    info: BlobInfo
    chunks: int
    digest: str


class BlobReader:
    """The reading half of backbone.bus.blobs.Blobs.

    Every message is asked for by its subject: whoever may do that, and no more, can read what it can name. Any replica
    answers such a question, and one of them may lag: what it does not have, the stream's leader is asked for, where
    that is allowed (it reads by sequence too, which is everything); else the replicas are asked again for a while.
    """

    def __init__(self, questions: Questions, *, may_ask_leader: bool) -> None:
        self._questions = questions
        self._may_ask_leader = may_ask_leader

    async def meta(self, name: str) -> Meta | None:
        """What is known of a blob. Raises Unavailable and BlobBroken."""
        if not is_blob_name(name):
            return None
        data = await self._get(blob_meta(name))
        return _parse_meta(name, data) if data is not None else None

    async def read(self, name: str) -> AsyncGenerator[bytes, None]:
        """Fetch, check, give out."""
        meta = await self.meta(name)
        if meta is None:
            raise BlobGone
        digest, size, at, end = sha256(), 0, 0, meta.chunks
        fetching = asyncio.create_task(self._fetch(name, range(at, min(at + BATCH, end)))) if end else None
        try:
            while fetching is not None:
                chunks = deque(await fetching)
                at += len(chunks)
                # Fetched while these are given out.
                more = range(at, min(at + BATCH, end))
                fetching = asyncio.create_task(self._fetch(name, more)) if more else None
                while chunks:
                    data = chunks.popleft()
                    digest.update(data)
                    size += len(data)
                    if at == end and not chunks:
                        _check(meta, size, digest.digest())
                    yield data
            _check(meta, size, digest.digest())
        finally:
            if fetching is not None:
                fetching.cancel()
                with contextlib.suppress(asyncio.CancelledError, NexusError):
                    await fetching

    async def _fetch(self, name: str, numbers: range) -> list[bytes]:
        """These chunks. Raises BlobBroken when one is missing."""
        chunks = await asyncio.gather(*(self._get(blob_chunk(name, number)) for number in numbers))
        found = [chunk for chunk in chunks if chunk is not None]
        if len(found) < len(chunks):
            raise BlobBroken
        return found

    async def _get(self, subject: str) -> bytes | None:
        """The message on a subject; None when there is none, or one that was erased. Raises Unavailable."""
        until = time.monotonic() + LAG_S
        while True:
            answer = (await self._ask(DIRECT_GET + b"." + subject.encode(), b""))[0]
            if answer.status is None:
                return answer.data or None
            _require_not_found(answer)
            if self._may_ask_leader:
                return await self._ask_leader({"last_by_subj": subject})
            if time.monotonic() > until:
                return None
            await asyncio.sleep(LAG_AGAIN_S)

    async def _ask_leader(self, what: dict[str, Any]) -> bytes | None:
        answer = orjson.loads((await self._ask(LEADER_GET, orjson.dumps(what)))[0].data)
        error = answer.get("error")
        if error is None:
            return base64.b64decode(answer["message"].get("data", "")) or None
        if error.get("err_code") == NO_MESSAGE:
            return None
        raise Unavailable(f"NATS does not read a large payload: {error.get('description')}")

    async def _ask(self, subject: bytes, body: bytes) -> list[Answer]:
        """Ask until there is an answer, over a reconnect too: reading can be repeated. Raises Unavailable."""
        return await ask(self._questions, subject, body)


def _require_not_found(answer: Answer) -> None:
    status = answer.status
    if status is None or status.code not in {NOT_FOUND, 204}:
        raise Unavailable(f"NATS does not read a large payload: {status}")


def _check(meta: Meta, size: int, digest: bytes) -> None:
    if size != meta.info.size or digest_text(digest) != meta.digest:
        raise BlobBroken


def _parse_meta(name: str, data: bytes) -> Meta | None:
    try:
        found = orjson.loads(data)
        if found.get("deleted"):
            return None
        info = BlobInfo(
            name=name,
            size=found["size"],
            content_type=found["headers"]["Content-Type"][0],
            owner=found["metadata"]["owner"],
        )
        return Meta(info, int(found["chunks"]), str(found["digest"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BlobBroken from error
