"""A lean HTTP/1.1 client for the hot path between a worker and its inference server.

What it guarantees:

- `request` returns when the response's head is there; the body follows by `read`, everything that has arrived at once.
- A body may be streamed, as fast as the server takes it. It goes over a connection of its own, and is never sent twice.
  An answer that comes before all of it is sent ends the sending; that connection is not used again.
- A connection is used again only when its response was read to the end, and never while it is doubtful. A kept one
  that turns out to be dead before any byte of the response is replaced, once, by a new one.
- `Response.close`, also by way of a cancelled `request`, closes the socket at once: that is what stops the server's work.
- At most `UNREAD_LIMIT` bytes (and one read of the socket) wait unread; beyond that the server is made to wait.
- Errors: `BackendUnavailable` when no connection can be made (`unsent`, where nothing was sent before), `BackendError(transient=True)` when one breaks,
  `BackendError` for an answer that is not HTTP, is compressed in a way that `content_coding` does not know, or redirects
  (redirects are never followed), or that a Nexus gateway refuses since the request comes from a Nexus.
- A compressed answer, which nobody asks for, is decoded as it is read, within bounds.

There is no time limit here but for connecting; waiting is the worker's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from typing import cast
from urllib.parse import urlsplit

import httptools

from schemas.errors import RequestLoop
from schemas.hops import HOPS_HEADER, LOOP_STATUS
from workers.adapter_kit.content_coding import ResponseDecoder
from workers.backends.base import BackendError, BackendUnavailable

CONNECT_TIMEOUT_S = 5.0
GRACE_S = 1.0
"""How long an answer whose content is complete may take to end formally before its connection is given up."""
MAX_IDLE = 256
UNREAD_LIMIT = 256 * 1024
HEAD_LIMIT = 64 * 1024
QUICKACK = getattr(socket, "TCP_QUICKACK", None)
"""Linux only."""
GATEWAY_HOPS: ContextVar[int] = ContextVar("hops", default=0)
"""Through how many gateways the job that a task works on had come before this Nexus's."""
REDIRECTS = frozenset({301, 302, 303, 307, 308})


class BackendResponse:
    """One answer. Read it to the end (`read` returns b"") or `close` it."""

    __slots__ = (
        "_connection",
        "_decoder",
        "_error",
        "_paused",
        "_pieces",
        "_unread",
        "_waiter",
        "ended",
        "headers",
        "status",
    )

    def __init__(self, connection: _ClientConnection) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """Names in lower case."""
        self.ended = False
        self._connection: _ClientConnection | None = connection
        self._pieces: list[bytes] = []
        self._unread = 0
        self._paused = False
        self._error: BackendError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._decoder: ResponseDecoder | None = None

    async def read(self) -> bytes:
        """All that has arrived, at least one byte; b"" at the end. Raises BackendError when the connection broke."""
        if self._decoder is not None:
            return await self._read_decoded(self._decoder)
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self.ended:
                return b""
            await self._wait()
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
        await asyncio.sleep(0)  # a small answer may hold a large one: others get their turn between its slices
        out = decoder.more()
        self._decoder = None
        try:
            while not out:
                data = await self.read()
                if not data:
                    decoder.finish()
                    return b""
                out = decoder.decode(data)
        finally:
            self._decoder = decoder
        return out

    async def read_all(self, limit: int) -> bytes:
        """The whole body. Raises BackendError when it is larger than `limit` bytes."""
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
        """Done with it. Unless the response has ended, its connection is closed, which stops the server's work."""
        if self._connection is not None:
            self._connection.abort()

    def release(self) -> None:
        """Done with it, and its content was complete: keep the connection if the formal end comes within `GRACE_S`."""
        if self._connection is not None:
            self._connection.linger()

    async def _head(self) -> None:
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _end(self, error: BackendError | None = None) -> None:
        self._connection = None
        self._error = error
        self.ended = error is None
        self._wake()


class _ClientConnection(asyncio.Protocol):
    """One socket: what arrives goes to the response that is awaited on it."""

    def __init__(self, client: HttpClient) -> None:
        self.client = client
        self.response: BackendResponse | None = None
        self.silent = True
        """Nothing has arrived since the last request was sent."""
        self.sending = False
        """A request's body is not sent to its end."""
        self._full = False
        self._head_size = 0
        self._interim = False
        self._complete = False
        self._reusable = False
        self._lingering: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport
        self._socket: socket.socket | None = None
        self._parser = httptools.HttpResponseParser(self)

    def send(self, data: bytes) -> BackendResponse:
        """Write a request. One at a time."""
        self.response = response = BackendResponse(self)
        self.silent = True
        self._head_size = 0
        self._complete = False
        self._transport.write(data)
        if QUICKACK is not None and self._socket is not None:
            # A server that writes head and body apart (Python's own does) sends the body only when the head is
            # acknowledged, which the kernel otherwise puts off for 40 ms.
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)
        return response

    async def upload(self, data: bytes) -> bool:
        """Write a piece of the body as soon as the server takes it; False when it answered or went away instead."""
        response = self.response
        while response is not None and self._full and not response.status:
            await response._wait()
            response = self.response
        if response is None or response.status:
            return False
        self._transport.write(data)
        return True

    @property
    def usable(self) -> bool:
        """Whether another request may be sent on it, as far as is known here."""
        return self.response is None and not self._transport.is_closing()

    def resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close the socket now."""
        self._transport.abort()

    def linger(self) -> None:
        """Drop what still comes, and the connection too unless the response ends soon."""
        if self._lingering is None:
            self._lingering = asyncio.get_running_loop().call_later(GRACE_S, self.abort)
            self.resume()

    # asyncio's side

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self.response is not None:
            self.response._wake()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not inherit from it
        self._socket = transport.get_extra_info("socket")

    def data_received(self, data: bytes) -> None:
        response = self.response
        if response is None:
            self.abort()  # nobody asked for anything
            return
        self.silent = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.abort()
            if not self._complete:
                self._fail(BackendError(f"{self.client.origin} answered with something that is not HTTP: {error}"))
                return
        if self._complete:
            self._finish(response)
            return
        if not response.status:
            self._head_size += len(data)
            if self._head_size > HEAD_LIMIT:
                self.abort()
                self._fail(BackendError(f"{self.client.origin} sent more than {HEAD_LIMIT} bytes of headers"))
            return
        if response._unread > UNREAD_LIMIT and not response._paused:
            response._paused = True
            self._transport.pause_reading()
        response._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.client._forget(self)
        if self._lingering is not None:
            self._lingering.cancel()
        response = self.response
        if response is None:
            return
        if exc is None and response.status and ends_with_connection(response.headers):
            self.response = None
            response._end()
            return
        where = "in the middle of" if response.status else "before"
        error = BackendError(f"{self.client.origin} closed the connection {where} its answer", transient=True)
        error.unanswered = not response.status
        self._fail(error)

    def _finish(self, response: BackendResponse) -> None:
        """The response is complete: hand it over, and keep the connection if both sides may."""
        self.response = None
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if response._paused:
            self.resume()
        response._end()
        if self.sending:
            self.abort()
        elif self._reusable and not self._transport.is_closing():
            self.client._keep(self)
        else:
            self._transport.close()

    def _fail(self, error: BackendError) -> None:
        response, self.response = self.response, None
        if response is not None:
            response._end(error)

    # httptools' side: called within feed_data

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.response is not None:
            self.response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
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
        response = self.response
        if response is not None and self._lingering is None:
            response._pieces.append(body)
            response._unread += len(body)

    def on_message_complete(self) -> None:
        if not self._interim:
            self._complete = True
            self._reusable = self._parser.should_keep_alive()  # llhttp knows only now


class HttpClient:
    """Connections to one server. `url` is its base: `http[s]://host[:port][/prefix]`; paths are appended to it.

    Raises ValueError when `url` or a header makes no sense.
    """

    def __init__(self, url: str, *, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError("a backend's URL looks like http://host:port or https://host/prefix")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = parts.scheme == "https"
        self._ssl: ssl.SSLContext | None = None
        self.prefix = parts.path.rstrip("/")
        self.origin = f"{parts.scheme}://{parts.netloc}"
        self._fixed = _head(
            {"host": parts.netloc, "user-agent": "nexus", "accept-encoding": "identity", HOPS_HEADER: "1"}
            | (headers or {})
        )
        self._idle: list[_ClientConnection] = []
        self._open: set[_ClientConnection] = set()
        self._closed = False

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        pieces: AsyncIterator[bytes] | None = None,
        length: int | None = None,
    ) -> BackendResponse:
        """Send one request; return when the head of its response is there. Never sent twice but for a stale connection.

        `pieces` is a body to be streamed, in the place of `body`: of `length` bytes, or chunked where that is not known.
        It is closed in the end, also where it was not read to its end. What it raises is raised here.
        """
        extra = _head(headers) if headers else ""
        if pieces is not None:
            return await self._upload(method, path, content_type, extra, pieces, length)
        message = self._message(method, path, body, content_type, extra)
        connection = self._take()
        if connection is not None:
            try:
                return await self._exchange(connection, message)
            except BackendError as error:
                if not (connection.silent and error.transient):
                    raise
                return await self._exchange(await self._connect_again(), message)
        return await self._exchange(await self._connect(), message)

    async def close(self) -> None:
        """Close every connection."""
        self._closed = True
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()

    def _message(self, method: str, path: str, body: bytes | None, content_type: str, extra: str) -> bytes:
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self._fixed_head()}{extra}"
        if body is None:
            return f"{head}\r\n".encode("latin-1")
        head = f"{head}content-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode("latin-1") + body

    def _fixed_head(self) -> str:
        """The headers of every request; of one that came through other gateways, with their number."""
        hops = GATEWAY_HOPS.get()
        return self._fixed.replace(f"{HOPS_HEADER}: 1\r\n", f"{HOPS_HEADER}: {hops + 1}\r\n") if hops else self._fixed

    async def _upload(
        self, method: str, path: str, content_type: str, extra: str, pieces: AsyncIterator[bytes], length: int | None
    ) -> BackendResponse:
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self._fixed_head()}{extra}content-type: {content_type}\r\n{framing}\r\n\r\n"
        try:
            connection = await self._connect()
            response = connection.send(head.encode("latin-1"))
            connection.sending = True
            try:
                if await _send_pieces(connection, pieces, length):
                    connection.sending = False
                await response._head()
                _accept(response, self.origin)
            except BaseException:
                connection.abort()
                raise
        finally:
            await _close_pieces(pieces)
        return response

    async def _exchange(self, connection: _ClientConnection, message: bytes) -> BackendResponse:
        response = connection.send(message)
        try:
            await response._head()
            _accept(response, self.origin)
        except BaseException:
            connection.abort()
            raise
        return response

    def _take(self) -> _ClientConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> _ClientConnection:
        loop = asyncio.get_running_loop()
        if self._tls and self._ssl is None:
            self._ssl = await loop.run_in_executor(None, ssl.create_default_context)  # reads some 150 certificates
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: _ClientConnection(self), self._host, self._port, ssl=self._ssl
                )
        except TimeoutError as error:
            message = f"no connection to {self.origin} within {CONNECT_TIMEOUT_S:g} s"
            raise BackendUnavailable(message, unsent=True) from error
        except OSError as error:
            raise BackendUnavailable(
                f"no connection to {self.origin}: {error.strerror or error}", unsent=True
            ) from error
        self._open.add(connection)
        return connection

    async def _connect_again(self) -> _ClientConnection:
        """A connection for a request that a kept one may have brought to the server before it broke."""
        try:
            return await self._connect()
        except BackendUnavailable as error:
            error.unsent, error.unanswered = False, True
            raise

    def _keep(self, connection: _ClientConnection) -> None:
        if self._closed or len(self._idle) >= MAX_IDLE:
            connection.abort()
        else:
            self._idle.append(connection)

    def _forget(self, connection: _ClientConnection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


async def _send_pieces(connection: _ClientConnection, pieces: AsyncIterator[bytes], length: int | None) -> bool:
    """Whether all was sent: not if the server answered first. Raises ValueError when there is more or less than `length`."""
    sent = 0
    async for piece in pieces:
        if not piece:
            continue
        sent += len(piece)
        if length is not None and sent > length:
            raise ValueError(f"the body is longer than the {length} bytes that were announced")
        # An answer that lies there already must be seen before a write finds the connection closed.
        await asyncio.sleep(0)
        if not await connection.upload(piece if length is not None else b"%x\r\n%b\r\n" % (len(piece), piece)):
            return False
    if length is None:
        return await connection.upload(b"0\r\n\r\n")
    if sent < length:
        raise ValueError(f"the body is shorter than the {length} bytes that were announced")
    return True


async def _close_pieces(pieces: AsyncIterator[bytes]) -> None:
    close = getattr(pieces, "aclose", None)
    if close is not None:
        await close()


def _head(headers: Mapping[str, str]) -> str:
    for name, value in headers.items():
        if not (name + value).isascii() or not (name + value).isprintable():
            raise ValueError(f"the header {name} holds a character that a header must not hold")
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def ends_with_connection(headers: dict[str, str]) -> bool:
    """Whether the body ends where the connection does."""
    return "content-length" not in headers and "chunked" not in headers.get("transfer-encoding", "").lower()


def _accept(response: BackendResponse, origin: str) -> None:
    """Refuse what this client does not speak. Raises BackendError."""
    if response.status == LOOP_STATUS and HOPS_HEADER in response.headers:
        message = (
            f"{origin} is a Nexus gateway, and this worker belongs to a Nexus: its jobs would go round in circles. Give the worker the"
            " URL of the inference server itself; for a Nexus behind another one, set GATEWAY_MAX_HOPS there."
        )
        raise BackendError(info=RequestLoop(message).info)
    if response.status in REDIRECTS:
        raise BackendError(
            f"{origin} redirects to {response.headers.get('location', 'nowhere')}; give the backend's final URL"
        )
    encoding = response.headers.get("content-encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        response._decoder = ResponseDecoder(encoding, origin, whole=response.status == 200)
