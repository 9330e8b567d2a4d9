"""From an HTTP request's body to what travels: checked, and by reference where it is large."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from backbone.bus.blobs import INLINE_LIMIT, Blobs, BlobWriter
from gateway.endpoint import Endpoint
from gateway.forms import Form, read_form
from gateway.http import Headers
from gateway.parsing import Receive, body_pieces, check, parse, read_body
from gateway.remote_media import RemoteMedia
from schemas.errors import RequestTooLarge
from schemas.jobs import Upload

LARGE = 1024 * 1024
"""Bytes above which a JSON body waits for its share of the memory."""
WEIGHT = 4
"""Times its size that a JSON body takes while it is read and checked."""


@dataclass(slots=True)
class Received:
    """A request that was read and checked."""

    request: Any
    """An instance of the endpoint's schema."""
    body: bytes
    """What follows the envelope in the job message."""
    body_size: int | None = None
    body_blob: str | None = None
    uploads: tuple[Upload, ...] = ()
    blobs: list[BlobWriter] = field(default_factory=list)

    async def discard(self) -> None:
        """Remove what was stored for it. Idempotent, never raises."""
        blobs, self.blobs = self.blobs, []
        for blob in blobs:
            await blob.abort()


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads bodies, within bounds."""

    blobs: Blobs
    max_bytes: int
    timeout_s: float
    blob_ttl_s: float
    budget: Budget
    media: RemoteMedia

    async def read(self, endpoint: Endpoint, headers: Headers, receive: Receive, *, here: bool) -> Received:
        """Raises InvalidRequest, RequestTooLarge, RequestTimeout, Unavailable, CallerGone; nothing is stored then.

        `here`: the body has arrived already.
        """
        if endpoint.files:
            return await self._form(endpoint, headers, receive)
        if here:
            return await self._json(endpoint, headers, receive, here=True)
        async with self.memory(headers, here=False):
            return await self._json(endpoint, headers, receive, here=False)

    async def of_value(self, endpoint: Endpoint, value: dict[str, Any], uploads: tuple[Upload, ...] = ()) -> Received:
        """A request that came within something else, or was made of several: `value` is its JSON body, checked here.

        Raises InvalidRequest, RequestTooLarge, Unavailable.
        """
        request: Any = check(value, endpoint.schema)
        body = orjson.dumps(value)
        if len(body) > self.max_bytes:
            raise RequestTooLarge(f"the request is larger than the limit of {self.max_bytes} bytes")
        body = await self.media.inline(request, body)
        received = Received(request, body, uploads=uploads, body_size=len(body) if uploads else None)
        if len(body) > INLINE_LIMIT:
            await self.refer(received)
        return received

    def memory(self, headers: Headers, *, here: bool) -> contextlib.AbstractAsyncContextManager[None]:
        """Hold it as long as the JSON of such a body is in memory, parsed or not. `here`: as for `read`."""
        size = _content_length(headers, self.max_bytes)
        return contextlib.nullcontext() if here or size <= LARGE else self.budget.share(WEIGHT * size)

    def lasting(self, blob_ttl_s: float) -> Reader:
        """The same, for requests whose blobs must last that long."""
        return replace(self, blob_ttl_s=blob_ttl_s)

    async def _json(self, endpoint: Endpoint, headers: Headers, receive: Receive, *, here: bool) -> Received:
        body = await read_body(headers, receive, self.max_bytes, self.timeout_s, here=here)
        request: Any = parse(body, endpoint.schema)
        body = await self.media.inline(request, body)
        received = Received(request, body)
        if len(body) > INLINE_LIMIT:
            await self.refer(received)
        return received

    async def refer(self, received: Received) -> None:
        """Let the body travel by reference."""
        writer = self._writer()
        received.blobs.append(writer)
        try:
            await writer.write(received.body)
            received.body_blob = (await writer.close()).name
            received.body = b""
        except BaseException:
            await received.discard()
            raise

    async def _form(self, endpoint: Endpoint, headers: Headers, receive: Receive) -> Received:
        content_type = next((value for name, value in headers if name == b"content-type"), b"")
        form = Form()
        received = Received(None, b"", blobs=form.blobs)
        pieces = body_pieces(headers, receive, self.max_bytes, self.timeout_s)
        try:
            await read_form(content_type, pieces, endpoint.files, self._writer, form)
            received.request = check(form.fields, endpoint.schema)
            body = orjson.dumps(received.request.model_dump(mode="json", exclude_unset=True))
            body = await self.media.inline(received.request, body)
        except BaseException:
            await received.discard()
            raise
        received.uploads = tuple(form.uploads)
        received.body_size = len(body)
        received.body = b"".join((body, *form.inline))
        return received

    def _writer(self) -> BlobWriter:
        return self.blobs.writer(ttl_s=self.blob_ttl_s)


def _content_length(headers: Headers, unknown: int) -> int:
    """What the caller says; for a chunked body the most that it may be. What is no number is refused on reading."""
    value = next((value for name, value in headers if name == b"content-length"), b"")
    return min(int(value), unknown) if value.isdigit() and len(value) < 20 else unknown


class Budget:
    """Bytes of memory that large bodies share, first come, first served."""

    def __init__(self, total: int) -> None:
        self._left = self._total = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def share(self, size: int) -> AsyncIterator[None]:
        """Wait until `size` bytes are free, and hold them inside."""
        size = min(size, self._total)
        await self._take(size)
        try:
            yield
        finally:
            self._give(size)

    async def _take(self, size: int) -> None:
        if not self._waiting and size <= self._left:
            self._left -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give(size)
            raise

    def _give(self, size: int) -> None:
        self._left += size
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.cancelled():
                if wanted > self._left:
                    return
                self._left -= wanted
                turn.set_result(None)
            self._waiting.popleft()
