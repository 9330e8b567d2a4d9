"""ASGI types, headers and replies that all handlers share: request ids, disconnects, OpenAI's error objects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
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
BEGUN = "nexus.begun"
"""The request as far as `AsgiApp.begin` has served it; calling the application continues it."""
CALLER_INFO = "nexus.caller"
HOPS = "nexus.hops"
SESSION = "nexus.session"
"""What a session's cookie is worth: set for requests that have such a cookie and no key."""
RATE_HEADERS = "nexus.rate_headers"
"""A function that returns the headers about the caller's rate limits, or None: set for keys that have such limits."""
COMMON_HEADERS = "nexus.common_headers"
"""The headers that the ASGI app adds to every answer."""
STREAM_HEADERS: Headers = [(b"cache-control", b"no-cache, no-store"), (b"x-accel-buffering", b"no")]
"""Headers of a streamed answer: proxies must not buffer it."""
NO_STORE = (b"cache-control", b"no-store")
ADAPTED_HEADER = b"x-nexus-adapted"
"""Header that names the parameters that a worker replaced by their nearest equivalents."""
CONNECTION_CLOSE = (b"connection", b"close")
CLOSING_STATUSES = frozenset({408, 413})
"""Statuses after which the connection closes, because the rest of the request's body is not read."""


def closes_connection(info: ErrorInfo) -> bool:
    """Return whether the connection closes after this error, because the rest of the request's body is not read."""
    return info.status in CLOSING_STATUSES or info.code == BodyMemoryFull.code


def adapted_header(parameters: tuple[str, ...]) -> Headers:
    """Return the header that names adapted parameters; an empty list if there are none."""
    return [(ADAPTED_HEADER, ", ".join(parameters).encode())] if parameters else []


def request_id_of(scope: Scope) -> str:
    """Return the id that the ASGI app gave the request."""
    value: str = scope[REQUEST_ID]
    return value


def to_error_info(error: Exception, request_id: str) -> ErrorInfo:
    """Return the error object for an exception that is being handled. Logs exceptions that are not a NexusError: defects."""
    if isinstance(error, NexusError):
        return error.info
    log.error("request.crashed", request_id=request_id, exc_info=error)
    return InternalError(f"internal error; request id {request_id}").info


class Caller:
    """Address and owner behind a connection, at `scope[CALLER_INFO]`."""

    __slots__ = ("address", "key_id", "owner")

    def __init__(self, address: str) -> None:
        self.address = address
        """The caller's IPv4 address or IPv6 /64 network."""
        self.owner = ""
        """Owner of the key that was used last on the connection; empty before the first."""
        self.key_id = ""
        """Id of that key, or of the person who signed in; empty for the bootstrap key."""


class HttpExchange(Protocol):
    """Nexus's extension to ASGI for one request, at `scope[EXCHANGE]`; other HTTP servers lack it."""

    @property
    def body_complete(self) -> bool:
        """Whether the whole body has arrived, so that `receive` will not wait."""

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Set the function to call when the caller disconnects; it is called at once if that has happened."""

    def try_write(self, data: bytes) -> bool:
        """Write a piece of a streamed body now. Returns False, and writes nothing, if it must go through `send`."""

    def report_buffered(self, size: int) -> None:
        """Report that `size` bytes are buffered for the caller beyond what was written. May end the connection."""

    def end_call(self, error: NexusError) -> None:
        """End the call, if it is still open: with the error, or with a reset if a part of another answer was sent."""

    def truncate(self) -> None:
        """Close the connection after what was written, so that the caller sees that the answer is not complete."""

    @property
    def writable(self) -> bool:
        """Whether `try_send` will send the answer."""

    def call_app(self, begun: object) -> None:
        """Call the ASGI app in a task, with `begun` at `scope[BEGUN]`."""

    def try_send(self, status: int, content_type: str, body: bytes, headers: Headers) -> bool:
        """Send a complete answer, in one write. Returns False, and writes nothing, if it must go through `send`.

        `headers` are all of its headers beside those that describe the body; their values are valid.
        """


Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def body_is_complete(scope: Scope) -> bool:
    """Return whether the whole body has arrived, so that reading it does not wait."""
    exchange: HttpExchange | None = scope.get(EXCHANGE)
    return exchange is not None and exchange.body_complete


def watch_disconnect(
    exchange: HttpExchange | None, receive: Receive, on_disconnect: Callable[[], None]
) -> Callable[[], None]:
    """Call `on_disconnect` when the caller disconnects. Returns the function that ends the watch. The body must have been read."""
    if exchange is not None:
        exchange.on_disconnect(on_disconnect)
        return lambda: exchange.on_disconnect(None)
    watcher = asyncio.create_task(_wait_for_disconnect(receive, on_disconnect))

    def unwatch() -> None:
        watcher.cancel()

    return unwatch


async def _wait_for_disconnect(receive: Receive, on_disconnect: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    on_disconnect()


class Reply:
    """Sends one HTTP response."""

    __slots__ = ("common_headers", "exchange", "headers", "request_id", "send", "started", "status")

    def __init__(
        self,
        send: Send,
        request_id: str,
        *,
        exchange: HttpExchange | None = None,
        common_headers: Headers | None = None,
    ) -> None:
        """`exchange` takes complete answers past `send`, with `common_headers`, which `send` adds by itself."""
        self.send = send
        self.request_id = request_id
        self.exchange = exchange
        self.common_headers: Headers = common_headers or []
        self.headers: Headers = []
        self.started = False
        self.status = 0
        """Status that was sent; 0 before."""

    @classmethod
    def to(cls, scope: Scope, send: Send) -> Reply:
        """Return the reply to the request of `scope`, which the ASGI app has given an id."""
        return cls(send, request_id_of(scope), exchange=scope.get(EXCHANGE), common_headers=scope.get(COMMON_HEADERS))

    async def send_head(self, status: int, headers: Headers) -> None:
        """Send the head. The ASGI app adds the request id and CORS headers."""
        self.started, self.status = True, status
        await self.send({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})

    async def send_chunk(self, data: bytes) -> None:
        """Send a piece of the body."""
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def send_end(self, data: bytes = b"") -> None:
        """Send the last piece of the body."""
        await self.send({"type": "http.response.body", "body": data, "more_body": False})

    def try_send(self, content_type: str, data: bytes) -> bool:
        """Send a complete answer with status 200, in one write. Returns False, and sends nothing, if `send_response` must."""
        headers = self.headers + self.common_headers
        if self.exchange is None or not self.exchange.try_send(200, content_type, data, headers):
            return False
        self.started, self.status = True, 200
        return True

    async def send_response(self, status: int, content_type: str, data: bytes, headers: Headers | None = None) -> None:
        """Send a complete response."""
        if status == 200 and not headers and self.try_send(content_type, data):
            return
        head = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(data)), NO_STORE]
        if headers:
            head += headers
        await self.send_head(status, head)
        await self.send_end(data)

    async def send_error(self, info: ErrorInfo) -> None:
        """Send OpenAI's error object."""
        headers = [(name.encode(), value.encode()) for name, value in info.headers().items()]
        if closes_connection(info):
            headers.append(CONNECTION_CLOSE)
        if info.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send_response(info.status, "application/json", orjson.dumps(info.body()), headers)
