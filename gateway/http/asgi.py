"""Bare ASGI replies, with what every answer of Nexus carries: a request id, CORS headers, OpenAI's errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import orjson
import structlog

from schemas.errors import BodyMemoryFull, ErrorInfo, InternalError, NexusError

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

REQUEST_ID = "nexus.request_id"
EXCHANGE = "nexus.line"
CALLER_INFO = "nexus.caller"
HOPS = "nexus.hops"
STREAM_HEADERS: Headers = [(b"cache-control", b"no-cache, no-store"), (b"x-accel-buffering", b"no")]
"""Of an answer that is passed on as it is made: nothing in between keeps it."""
NO_STORE = (b"cache-control", b"no-store")
ADAPTED = b"x-nexus-adapted"
"""Names the parameters of the request that were replaced by their nearest equivalent."""
CLOSE = (b"connection", b"close")
CLOSING = frozenset({408, 413})
"""Statuses after which the connection ends: the rest of the request's body is not read."""


def closes(info: ErrorInfo) -> bool:
    """Whether the connection ends with this error, because the rest of the request's body is not read."""
    return info.status in CLOSING or info.code == BodyMemoryFull.code


def adapted_header(parameters: tuple[str, ...]) -> Headers:
    """Return the header that names what was replaced; none where nothing was."""
    return [(ADAPTED, ", ".join(parameters).encode())] if parameters else []


def request_id_of(scope: Scope) -> str:
    """The id that the door gave this request."""
    value: str = scope[REQUEST_ID]
    return value


def to_error_info(error: Exception, request_id: str) -> ErrorInfo:
    """What the caller is told of an error that is being handled; one that is none of Nexus's own is a defect, and logged."""
    if isinstance(error, NexusError):
        return error.info
    log.error("request.crashed", request_id=request_id, exc_info=error)
    return InternalError(f"internal error; request id {request_id}").info


class Caller:
    """Where a request came from, at `scope[CALLER_INFO]`."""

    __slots__ = ("address", "owner")

    def __init__(self, address: str) -> None:
        self.address = address
        """Its address, or its network, where that counts as one."""
        self.owner = ""
        """Whose key it used last; empty: none, as far as is known."""


class HttpExchange(Protocol):
    """What the HTTP server knows of one request beyond ASGI, at `scope[EXCHANGE]`; other servers leave it out."""

    @property
    def body_complete(self) -> bool:
        """The whole body is here: `receive` will not wait."""

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Call when the caller hangs up; at once, if that has happened."""

    def try_write(self, data: bytes) -> bool:
        """Write a piece of a streamed body now. False when it must go through `send`: nothing was written then."""

    def report_buffered(self, size: int) -> None:
        """Let `size` bytes that are stored for the caller, beyond what was written, count as unread. May end the connection."""

    def truncate(self) -> None:
        """End the connection after what was written, so that the caller sees that the answer is not complete."""

    def single_write(self) -> AbstractContextManager[None]:
        """What is sent inside leaves in one write."""


Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def body_is_complete(scope: Scope) -> bool:
    """The whole body is here: reading it waits for nobody."""
    exchange: HttpExchange | None = scope.get(EXCHANGE)
    return exchange is not None and exchange.body_complete


def watch_disconnect(exchange: HttpExchange | None, receive: Receive, gone: Callable[[], None]) -> Callable[[], None]:
    """Call `gone` when the caller hangs up. Returns the function that ends it. The request's body has been read."""
    if exchange is not None:
        exchange.on_disconnect(gone)
        return lambda: exchange.on_disconnect(None)
    watcher = asyncio.create_task(_hear_disconnect(receive, gone))

    def unwatch() -> None:
        watcher.cancel()

    return unwatch


async def _hear_disconnect(receive: Receive, gone: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()


class Reply:
    """One HTTP response."""

    __slots__ = ("_send", "headers", "request_id", "started", "status")

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.headers: Headers = []
        self.started = False
        self.status = 0
        """What was sent; 0: nothing yet."""

    async def send_head(self, status: int, headers: Headers) -> None:
        """Send the head. The door adds the request id and CORS headers."""
        self.started, self.status = True, status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})

    async def send_chunk(self, data: bytes) -> None:
        """Send a piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def send_end(self, data: bytes = b"") -> None:
        """Send the last piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def send_response(self, status: int, content_type: str, data: bytes, headers: Headers | None = None) -> None:
        """Send a complete response."""
        head = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(data)), NO_STORE]
        if headers:
            head += headers
        await self.send_head(status, head)
        await self.send_end(data)

    async def send_error(self, info: ErrorInfo) -> None:
        """Send OpenAI's error object."""
        headers = [(name.encode(), value.encode()) for name, value in info.headers().items()]
        if closes(info):
            headers.append(CLOSE)
        if info.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send_response(info.status, "application/json", orjson.dumps(info.body()), headers)
