"""One connection to an inference server, and the response that is read from it.

`HttpClient` makes and keeps connections; an adapter sees only `BackendResponse`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from workers.adapter_kit.content_coding import ResponseDecoder
from workers.backends.base import BackendError

RELEASE_GRACE_S = 1.0
"""How long a response whose content is complete may take to end formally before its connection is closed."""
UNREAD_LIMIT = 256 * 1024
"""Bytes that may wait unread before the server is made to wait."""
HEAD_LIMIT = 64 * 1024
QUICKACK = getattr(socket, "TCP_QUICKACK", None)
"""Linux only."""


class ConnectionPool(Protocol):
    """The owner of a connection."""

    origin: str
    """Scheme, host and port, for messages."""

    def keep_connection(self, connection: BackendConnection) -> None:
        """Keep a connection whose response has ended, for the next request."""

    def forget_connection(self, connection: BackendConnection) -> None:
        """Forget a connection that is closed."""


class BackendResponse:
    """One response of a server. Read it to the end (`read` returns b"") or `close` it."""

    __slots__ = (
        "_connection",
        "_error",
        "_paused",
        "_pieces",
        "_unread",
        "_waiter",
        "decoder",
        "ended",
        "headers",
        "sink",
        "status",
    )

    def __init__(self, connection: BackendConnection) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """Header names are in lower case."""
        self.ended = False
        self._connection: BackendConnection | None = connection
        self._pieces: list[bytes] = []
        self._unread = 0
        self._paused = False
        self._error: BackendError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.sink: Callable[[bytes], bool] | None = None
        """Gets bytes that arrive while the reader waits for them. Returns whether it took them; otherwise the reader is woken."""
        self.decoder: ResponseDecoder | None = None
        """Decodes the body as it is read; None for one that is not compressed."""

    async def read(self) -> bytes:
        """Return all that has arrived, at least one byte; b"" at the end. Raises BackendError when the connection broke."""
        if self.decoder is not None:
            return await self._read_decoded(self.decoder)
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self.ended:
                return b""
            await self.wait_for_event()
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        self._unread = 0
        if self._paused:
            self._paused = False
            if self._connection is not None:
                self._connection.resume()
        return data

    async def _read_decoded(self, decoder: ResponseDecoder) -> bytes:
        await asyncio.sleep(0)  # a small body may decode into a large one: other tasks run between its slices
        out = decoder.more()
        self.decoder = None
        try:
            while not out:
                data = await self.read()
                if not data:
                    decoder.finish()
                    return b""
                out = decoder.decode(data)
        finally:
            self.decoder = decoder
        return out

    async def read_all(self, limit: int) -> bytes:
        """Return the whole body. Raises BackendError when it is larger than `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        while data := await self.read():
            parts.append(data)
            size += len(data)
            if size > limit:
                self.close()
                raise BackendError(f"the backend's answer is larger than {limit} bytes")
        return b"".join(parts)

    def close(self) -> None:
        """End the reading. Unless the response has ended, its connection is closed, which stops the server's work."""
        if self._connection is not None:
            self._connection.abort()

    def release(self) -> None:
        """End the reading of complete content: keep the connection if the formal end comes within `RELEASE_GRACE_S`."""
        if self._connection is not None:
            self._connection.linger()

    async def receive_head(self) -> None:
        """Wait for the status and the headers. Raises BackendError when the connection broke before them."""
        while not self.status:
            if self._error is not None:
                raise self._error
            await self.wait_for_event()

    async def wait_for_event(self) -> None:
        """Wait until bytes arrive, the response ends, or the connection takes more of the request."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def pass_to(self, sink: Callable[[bytes], bool]) -> bool:
        """Offer `sink` what has arrived, unless the reader is busy with earlier bytes. Return whether nothing is left to read."""
        pieces, waiter = self._pieces, self._waiter
        if (
            not pieces
            or waiter is None
            or waiter.done()
            or not sink(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        ):
            return False
        self._pieces, self._unread = [], 0
        return True

    def wake(self) -> None:
        """Wake the task that waits for this response."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def end(self, error: BackendError | None = None) -> None:
        """Note the end of the response, or the error that broke it."""
        self._connection = None
        self._error = error
        self.ended = error is None
        self.wake()


class BackendConnection(asyncio.Protocol):
    """One socket, whose bytes go to the response that is awaited on it. One request at a time."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self.response: BackendResponse | None = None
        self.silent = True
        """No byte has arrived since the last request was sent."""
        self.sending = False
        """The request's body is not sent completely."""
        self._full = False
        self._head_size = 0
        self._interim = False
        self._complete = False
        self._reusable = False
        self._lingering: asyncio.TimerHandle | None = None
        self._sends_head_alone = True
        """The server may send the head of a response before its body; what it did last tells."""
        self._transport: asyncio.Transport
        self._socket: socket.socket | None = None
        self._parser = httptools.HttpResponseParser(self)

    def send(self, data: bytes) -> BackendResponse:
        """Write a request, and return its response, whose head is still to come."""
        self.response = response = BackendResponse(self)
        self.silent = True
        self._head_size = 0
        self._complete = False
        self._transport.write(data)
        if self._sends_head_alone and QUICKACK is not None and self._socket is not None:
            # Python's own server sends the body only when the head is acknowledged, which the kernel would delay by 40 ms.
            try:  # noqa: SIM105 - on the hot path, `suppress` costs as much as the call
                self._socket.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)
            except OSError:
                pass
        return response

    async def upload(self, data: bytes) -> bool:
        """Write a piece of the body as soon as the server takes it; return False when it responded or disconnected instead."""
        response = self.response
        while response is not None and self._full and not response.status:
            await response.wait_for_event()
            response = self.response
        if response is None or response.status:
            return False
        self._transport.write(data)
        return True

    @property
    def usable(self) -> bool:
        """Whether another request may be sent on it, as far as this side knows."""
        return self.response is None and not self._transport.is_closing()

    def resume(self) -> None:
        """Read from the socket again."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close the socket now."""
        self._transport.abort()

    def linger(self) -> None:
        """Drop the bytes that still come, and close the connection unless the response ends soon."""
        if self._lingering is None:
            self._lingering = asyncio.get_running_loop().call_later(RELEASE_GRACE_S, self.abort)
            self.resume()

    # Called by asyncio

    def pause_writing(self) -> None:
        """Note that the socket's buffer is full."""
        self._full = True

    def resume_writing(self) -> None:
        """Go on with the request's body."""
        self._full = False
        if self.response is not None:
            self.response.wake()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transport does not inherit from it
        self._socket = transport.get_extra_info("socket")

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, and pass it to the response."""
        response = self.response
        if response is None:
            self.abort()  # bytes without a request
            return
        first, self.silent = self.silent, False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.abort()
            if not self._complete:
                self._fail(BackendError(f"{self._pool.origin} answered with something that is not HTTP: {error}"))
                return
        if first:
            self._sends_head_alone = not (self._complete or response._pieces)
        if self._complete:
            self._finish(response)
            return
        if not response.status:
            self._head_size += len(data)
            if self._head_size > HEAD_LIMIT:
                self.abort()
                self._fail(BackendError(f"{self._pool.origin} sent more than {HEAD_LIMIT} bytes of headers"))
            return
        if response.sink is not None and response.pass_to(response.sink):
            return
        if response._unread > UNREAD_LIMIT and not response._paused:
            response._paused = True
            self._transport.pause_reading()
        response.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the response, or report that it broke."""
        self._pool.forget_connection(self)
        if self._lingering is not None:
            self._lingering.cancel()
        response = self.response
        if response is None:
            return
        if exc is None and response.status and ends_with_connection(response.headers):
            self.response = None
            response.end()
            return
        where = "in the middle of" if response.status else "before"
        error = BackendError(f"{self._pool.origin} closed the connection {where} its answer", transient=True)
        error.unanswered = not response.status
        self._fail(error)

    def _finish(self, response: BackendResponse) -> None:
        """End a complete response, and keep the connection if both sides allow it."""
        self.response = None
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if response._paused:
            self.resume()
        response.end()
        if self.sending:
            self.abort()
        elif self._reusable and not self._transport.is_closing():
            self._pool.keep_connection(self)
        else:
            self._transport.close()

    def _fail(self, error: BackendError) -> None:
        response, self.response = self.response, None
        if response is not None:
            response.end(error)

    # Called by httptools, within feed_data

    def on_message_begin(self) -> None:
        """Refuse a second response to one request."""
        if self._complete:
            raise ValueError("more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header."""
        if self.response is not None:
            self.response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Note the status; an interim response (1xx) is dropped."""
        status = self._parser.get_status_code()
        response = self.response
        if response is None:
            return
        self._interim = status < 200
        if self._interim:
            response.headers.clear()
        else:
            response.status = status

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body to the response."""
        response = self.response
        if response is not None and self._lingering is None:
            response._pieces.append(body)
            response._unread += len(body)

    def on_message_complete(self) -> None:
        """Note that the response is complete."""
        if not self._interim:
            self._complete = True
            self._reusable = self._parser.should_keep_alive()  # llhttp knows this only at the end


def ends_with_connection(headers: dict[str, str]) -> bool:
    """Return whether the body ends only where the connection does: it may have been cut short unnoticed."""
    return "content-length" not in headers and "chunked" not in headers.get("transfer-encoding", "").lower()
