"""Write answers past ASGI: pieces of a stream, answers to HTTP/1.0 clients, and the security headers of every answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol, cast

from uvicorn.protocols.http.httptools_impl import HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle

from gateway.http.asgi import BEGUN, EXCHANGE, NO_STORE, Headers, Send
from schemas.errors import NexusError

CLOSE_LINE = b"connection: close\r\n"

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    # Pages of other origins may show results by URL, and read the API by CORS: nothing here is sent with cookies.
    (b"cross-origin-resource-policy", b"cross-origin"),
)


class ExchangeConnection(Protocol):
    """The part of `HttpProtocol` that an exchange needs."""

    def call_app(self) -> None:
        """Call the ASGI app for the current request, in a task."""

    def report_unread(self, size: int) -> None:
        """Count `size` bytes as unread, besides those in the transport's buffer."""

    def end_call(self, cycle: RequestResponseCycle, error: NexusError) -> None:
        """End a call as `gateway.http.asgi.HttpExchange` describes."""


class UvicornExchange:
    """Implements `gateway.http.asgi.HttpExchange` on uvicorn's request: without ASGI per token, without a task per disconnect."""

    __slots__ = ("_callback", "_connection", "_cycle")

    def __init__(self, cycle: RequestResponseCycle, connection: ExchangeConnection) -> None:
        self._cycle = cycle
        self._connection = connection
        self._callback: Callable[[], None] | None = None

    @property
    def body_complete(self) -> bool:
        return not self._cycle.more_body

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback
        # A large body leaves reading paused, and a disconnect is only noticed while reading.
        self._cycle.flow.resume_reading()
        if self._cycle.disconnected:
            self.notify_disconnect()

    def notify_disconnect(self) -> None:
        """Call the disconnect callback, as the connection is lost."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def try_write(self, data: bytes) -> bool:
        cycle = self._cycle
        if cycle.flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def report_buffered(self, size: int) -> None:
        if not self._cycle.disconnected:
            self._connection.report_unread(size)

    def end_call(self, error: NexusError) -> None:
        self._connection.end_call(self._cycle, error)

    def truncate(self) -> None:
        self._cycle.disconnected = True
        self._cycle.transport.close()

    @property
    def writable(self) -> bool:
        cycle = self._cycle
        return not (
            cycle.flow.write_paused or cycle.disconnected or cycle.response_started or cycle.scope["method"] == "HEAD"
        )

    def call_app(self, begun: object) -> None:
        cast("dict[str, Any]", self._cycle.scope)[BEGUN] = begun
        self._connection.call_app()

    def try_send(self, status: int, content_type: str, body: bytes, headers: Headers) -> bool:
        if not self.writable:
            return False
        cycle = self._cycle
        head = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            head += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive:
            head.append(CLOSE_LINE)
        head.append(b"%bcontent-length: %d\r\n\r\n" % (_content_lines(content_type), len(body)))
        head.append(body)
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.transport.write(b"".join(head))
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        # Without these references no cycle is left to the garbage collector.
        cast("dict[str, Any]", cycle.scope).pop(EXCHANGE, None)
        self._callback = None
        cycle.on_response()
        return True


@functools.lru_cache(maxsize=256)
def _content_lines(content_type: str) -> bytes:
    """Return the header lines that describe a body. A worker names its type: anything but a header value becomes plain bytes."""
    value = content_type.encode("latin-1", "replace")
    if HEADER_VALUE_RE.search(value):
        value = b"application/octet-stream"
    return b"content-type: %b\r\n%b: %b\r\n" % (value, *NO_STORE)


def without_chunks(cycle: RequestResponseCycle) -> Send:
    """Return a `send` for HTTP/1.0: an answer without a Content-Length ends with its connection instead of using chunks."""
    send = cast("Send", cycle.send)
    counted = False

    async def send_plainly(message: MutableMapping[str, Any]) -> None:
        nonlocal counted
        if message["type"] == "http.response.start":
            counted = any(name == b"content-length" for name, _ in message["headers"])
            if not counted:
                cycle.chunked_encoding = False
        elif not counted:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plainly


def add_security_headers() -> None:
    """Add `SECURITY_HEADERS` to every answer of this process. Idempotent.

    They are written with the status line, at no cost per request: uvicorn takes half a microsecond for each header.
    """
    block = b"".join(b"%b: %b\r\n" % header for header in SECURITY_HEADERS)
    for status, line in STATUS_LINE.items():
        if status >= 200 and not line.endswith(block):
            STATUS_LINE[status] = line + block
