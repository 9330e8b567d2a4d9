"""Reading a blob from NATS."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import orjson

from backbone.bus.blob_writing import digest_text
from backbone.bus.blobs import BlobBroken, BlobGone, BlobInfo
from backbone.bus.questions import Answer, Questions
from backbone.bus.subjects import BLOBS_STREAM, blob_chunks, blob_meta, is_blob_name
from schemas.errors import NexusError, Unavailable

BATCH = 2
"""Chunks fetched at once. One batch is given out while the next one comes: a reader holds two."""
PATIENCE_S = 10.0
"""For an answer, over a reconnect too: reading can be repeated."""
AGAIN_S = 0.2
DIRECT_GET = f"$JS.API.DIRECT.GET.{BLOBS_STREAM}".encode()
LEADER_GET = f"$JS.API.STREAM.MSG.GET.{BLOBS_STREAM}".encode()
NO_MESSAGE = 10037
NOT_FOUND = 404
NO_RESPONDERS = 503

Chunk = tuple[int, bytes]
"""Sequence in the stream, and bytes."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What the store says about a blob."""

    info: BlobInfo
    chunks: int
    digest: str


class BlobReader:
    """The reading half of backbone.bus.blobs.Blobs.

    Any replica answers a direct get, and one of them may lag: what it does not have, the stream's leader is asked for.
    """

    def __init__(self, questions: Questions) -> None:
        self._questions = questions

    async def meta(self, name: str) -> Meta | None:
        """What is known of a blob. Raises Unavailable and BlobBroken."""
        if not is_blob_name(name):
            return None
        subject = blob_meta(name)
        answer = (await self._ask(DIRECT_GET + b"." + subject.encode(), b""))[0]
        if answer.status is None:
            return _parse_meta(name, answer.data)
        _require_not_found(answer)
        message = await self._ask_leader({"last_by_subj": subject})
        return _parse_meta(name, message[1]) if message else None

    async def read(self, name: str) -> AsyncGenerator[bytes, None]:
        """Fetch, check, give out."""
        meta = await self.meta(name)
        if meta is None:
            raise BlobGone
        digest, size, left = sha256(), 0, meta.chunks
        fetching = asyncio.create_task(self._fetch(name, 1, min(BATCH, left))) if left else None
        try:
            while fetching is not None:
                chunks = deque(await fetching)
                left -= len(chunks)
                # Asked for when it is known where to go on: fetched while these are given out.
                next_seq = chunks[-1][0] + 1
                fetching = asyncio.create_task(self._fetch(name, next_seq, min(BATCH, left))) if left else None
                while chunks:
                    data = chunks.popleft()[1]
                    digest.update(data)
                    size += len(data)
                    if not left and not chunks:
                        _check(meta, size, digest.digest())
                    yield data
            _check(meta, size, digest.digest())
        finally:
            if fetching is not None:
                fetching.cancel()
                with contextlib.suppress(asyncio.CancelledError, NexusError):
                    await fetching

    async def _fetch(self, name: str, seq: int, count: int) -> list[Chunk]:
        """Between one and `count` chunks, from sequence `seq` on. Raises BlobBroken when there is none."""
        where = {"seq": seq, "next_by_subj": blob_chunks(name)}
        answers = await self._ask(DIRECT_GET, orjson.dumps(where | {"batch": count}), many=True)
        chunks = [(int(one.header(b"Nats-Sequence") or 0), one.data) for one in answers if one.status is None]
        if chunks:
            return chunks
        _require_not_found(answers[-1])
        chunk = await self._ask_leader(where)
        if chunk is None:
            raise BlobBroken
        return [chunk]

    async def _ask_leader(self, what: dict[str, Any]) -> Chunk | None:
        answer = orjson.loads((await self._ask(LEADER_GET, orjson.dumps(what)))[0].data)
        error = answer.get("error")
        if error is None:
            message = answer["message"]
            return message["seq"], base64.b64decode(message.get("data", ""))
        if error.get("err_code") == NO_MESSAGE:
            return None
        raise Unavailable(f"NATS does not read a large payload: {error.get('description')}")

    async def _ask(self, subject: bytes, body: bytes, *, many: bool = False) -> list[Answer]:
        """Ask until there is an answer. Raises Unavailable after PATIENCE_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while not self._questions.closed:
                    with contextlib.suppress(Unavailable):
                        answers = await self._questions.ask(subject, body, many=many)
                        if answers is not None and not _is_unheard(answers[0]):
                            return answers
                    await asyncio.sleep(AGAIN_S)
        raise Unavailable("NATS does not answer for its store of large payloads; try again shortly")


def _is_unheard(answer: Answer) -> bool:
    status = answer.status
    return status is not None and status.code == NO_RESPONDERS


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
