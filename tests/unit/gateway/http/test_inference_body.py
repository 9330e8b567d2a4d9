"""Bodies within bounds: memory that large ones share, and nothing left of those that are refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import MutableMapping
from typing import Any

import orjson
import pytest

from backbone.bus.blobs import INLINE_LIMIT_BYTES
from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.byte_quotas import MemoryByteQuotas
from gateway.auth.authenticator import Authenticator
from gateway.http.asgi import REQUEST_ID
from gateway.http.body_memory import BodyMemory
from gateway.http.body_storage import BodyStorageFull
from gateway.http.inference_body import LARGE_BYTES, PARSED_SIZE_FACTOR, InferenceBodyReader, ReceivedRequest
from gateway.http.remote_media import RemoteMedia
from gateway.http.request_body import parse_normalized
from gateway.jobs.http_handler import DurableRequestHandler
from schemas.endpoints import BY_PATH, CHAT
from schemas.errors import InvalidRequest, RequestTooLarge
from tests.unit.gateway.http.test_multipart import TYPE, form, part


def reader(blobs: MemoryBlobStore, max_bytes: int = 10_000_000) -> InferenceBodyReader:
    return InferenceBodyReader(blobs, max_bytes, 5.0, 60.0, BodyMemory(2 * max_bytes), RemoteMedia(None, max_bytes))


def receive_of(body: bytes) -> Any:
    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def chat_body(size: int) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * size}]}).encode()


async def test_a_large_body_goes_by_reference_and_is_removed_after_it() -> None:
    blobs, body = MemoryBlobStore(), chat_body(INLINE_LIMIT_BYTES + 1)
    received = await reader(blobs).read(CHAT, [], receive_of(body), has_arrived=True)
    assert received.body == b""
    assert received.body_blob is not None
    assert b"".join([piece async for piece in blobs.read(received.body_blob)]) == body
    await received.discard()
    assert await blobs.info(received.body_blob) is None


async def test_a_small_body_travels_as_it_came() -> None:
    body = chat_body(10)
    received = await reader(MemoryBlobStore()).read(CHAT, [], receive_of(body), has_arrived=True)
    assert (received.body, received.body_blob, received.blobs) == (body, None, [])


async def test_a_form_becomes_typed_json_and_its_files() -> None:
    body = form(
        part("file", b"sound", "a.wav", "audio/wav"), part("model", b"w"), part("temperature", b"0.5"),
        part("timestamp_granularities[]", b"word"), part("vendor", b"1"),
    )  # fmt: skip
    received = await reader(MemoryBlobStore()).read(
        BY_PATH["/v1/audio/transcriptions"], [(b"content-type", TYPE)], receive_of(body), has_arrived=True
    )
    assert received.body_size is not None
    assert json.loads(received.body[: received.body_size]) == {
        "model": "w", "temperature": 0.5, "timestamp_granularities": ["word"], "vendor": "1",
    }  # fmt: skip
    assert received.body[received.body_size :] == b"sound"


async def test_a_form_that_is_refused_leaves_nothing() -> None:
    blobs = MemoryBlobStore()
    body = form(
        part("file", b"x" * (INLINE_LIMIT_BYTES + 1), "a.wav"), part("model", b"w"), part("temperature", b"hot")
    )
    with pytest.raises(InvalidRequest) as caught:
        await reader(blobs).read(
            BY_PATH["/v1/audio/transcriptions"], [(b"content-type", TYPE)], receive_of(body), has_arrived=True
        )
    assert caught.value.info.param == "temperature"
    assert not blobs.chunks_by_name()


async def test_an_upload_over_the_limit_is_refused() -> None:
    body = form(part("file", b"x" * 2000, "a.wav"), part("model", b"w"))
    with pytest.raises(RequestTooLarge):
        await reader(MemoryBlobStore(), 1000).read(
            BY_PATH["/v1/audio/transcriptions"], [(b"content-type", TYPE)], receive_of(body), has_arrived=True
        )


async def test_a_request_within_another_is_bounded_too() -> None:
    """A conversation of many responses, each of which was small enough, may not be."""
    message = {"role": "user", "content": "x" * 600}
    with pytest.raises(RequestTooLarge):
        await reader(MemoryBlobStore(), max_bytes=1000).read_value(CHAT, {"model": "m", "messages": [message, message]})


async def test_a_submitted_job_counts_until_it_lies_elsewhere() -> None:
    """However slowly large bodies are put away, no more of them are in memory than have room."""
    blobs, total = StuckBlobs(), 64 * 1024 * 1024
    memory = BodyMemory(total)
    bodies = InferenceBodyReader(blobs, total, 5.0, 60.0, memory, RemoteMedia(None, total))
    unused: Any = None
    submissions = DurableRequestHandler(
        unused,
        unused,
        unused,
        unused,
        bodies,
        Authenticator("key"),
        {CHAT.path: CHAT},
        unused,
        unused,
    )
    content = "x" * (2 * LARGE_BYTES)
    job = {"endpoint": CHAT.path, "body": {"model": "m", "messages": [{"role": "user", "content": content}]}}
    data = orjson.dumps(job)
    scope = {
        "headers": [(b"authorization", b"Bearer key"), (b"content-length", b"%d" % len(data))],
        REQUEST_ID: "req",
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(_message: Any) -> None:
        pass

    serving = asyncio.create_task(submissions.serve(scope, receive, send))
    await blobs.writing.wait()
    assert memory.used >= (PARSED_SIZE_FACTOR + 1) * len(data)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert memory.used == 0


class StuckBlobs(MemoryBlobStore):
    """Anyone who writes waits."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = asyncio.Event()

    def writer(self, **_options: Any) -> Any:
        return self

    async def write(self, _data: bytes) -> None:
        self.writing.set()
        await asyncio.Event().wait()

    async def abort(self) -> None:
        pass


async def test_one_owners_stored_bodies_have_a_limit() -> None:
    """At it the owner is told to retry, and others are served; an answered request counts no more."""
    blobs, quotas, body = MemoryBlobStore(), MemoryByteQuotas(), chat_body(INLINE_LIMIT_BYTES + 1)
    bodies = dataclasses.replace(reader(blobs), quotas=quotas)

    async def read(owner: str) -> ReceivedRequest:
        limit = {"owner": owner, "max_pending_bytes": len(body) + 1}
        return await bodies.read(CHAT, [], receive_of(body), has_arrived=True, **limit)  # type: ignore[arg-type]

    first = await read("a")
    assert quotas.used("a") == len(body)
    with pytest.raises(BodyStorageFull, match=str(len(body) + 1)):
        await read("a")
    assert (await read("b")).body_blob is not None
    await first.discard()
    assert quotas.used("a") == 0
    assert (await read("a")).body_blob is not None
    large = parse_normalized(body, CHAT.schema)[0].model_dump(exclude_unset=True)
    with pytest.raises(BodyStorageFull):
        await bodies.of("a", len(body) + 1).read_value(CHAT, large)
