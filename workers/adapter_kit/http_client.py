"""A lean HTTP/1.1 client for the hot path between a worker and its inference server.

What it guarantees:

- `request` returns when the response's head has arrived; the body follows by `read`, all that has arrived at once.
- A body may be streamed, as fast as the server takes it. It goes over a connection of its own, and is never sent twice.
  A response that comes before all of the body is sent ends the sending; that connection is not used again.
- A connection is used again only when its response was read to the end, and never while its state is in doubt. A kept connection
  that turns out to be dead before any byte of the response is replaced, once, by a new one.
- `BackendResponse.close`, or cancelling a `request`, closes the socket at once, which stops the server's work.
- At most `UNREAD_LIMIT` bytes (and one read of the socket) wait unread; beyond that the server is made to wait.
- A compressed body, which the client never requests, is decoded as it is read, within bounds.
- Errors: `BackendUnavailable` when no connection can be made (`unsent`, where no request was sent before);
  `BackendError(transient=True)` when a connection breaks; `BackendError` for a response that is not HTTP, that is compressed in a
  way that `content_coding` does not know, that redirects (redirects are never followed), or in which a Nexus gateway refuses a
  request from a Nexus.

Only connecting has a time limit here; the worker limits the rest.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from urllib.parse import urlsplit

from schemas.errors import RequestLoop
from schemas.hops import HOPS_HEADER, LOOP_STATUS
from workers.adapter_kit.content_coding import ResponseDecoder
from workers.adapter_kit.http_connection import BackendConnection, BackendResponse, ends_with_connection
from workers.backends.base import BackendError, BackendUnavailable

__all__ = ["GATEWAY_HOPS", "TRACE_HEADERS", "BackendResponse", "HttpClient", "ends_with_connection"]

CONNECT_TIMEOUT_S = 5.0
MAX_IDLE_CONNECTIONS = 1024
"""Fewer than a worker has slots would make each burst of requests connect again."""
GATEWAY_HOPS: ContextVar[int] = ContextVar("hops", default=0)
"""How many gateways the job of the current task has passed before the gateway of this Nexus."""
TRACE_HEADERS: ContextVar[str] = ContextVar("trace_headers", default="")
"""Headers that continue the trace of the current task's job, as lines of an HTTP request. Empty: it is not traced."""
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})


class HttpClient:
    """Sends requests to one server. `url` is its base: `http[s]://host[:port][/prefix]`; paths are appended to it.

    Raises ValueError when `url` or a header is invalid.
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
        self._fixed_headers = _format_headers(
            {"host": parts.netloc, "user-agent": "nexus", "accept-encoding": "identity", HOPS_HEADER: "1"}
            | (headers or {})
        )
        self._idle: list[BackendConnection] = []
        self._open: set[BackendConnection] = set()
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
        """Send one request; return its response when the head has arrived. A request is sent again only where a kept connection was dead.

        `pieces` is a body to stream in place of `body`: of `length` bytes, or chunked where the length is unknown.
        It is closed at the end, also where it was not read completely. Errors that it raises are raised here.
        """
        extra = _format_headers(headers) if headers else ""
        if pieces is not None:
            return await self._upload(method, path, content_type, extra, pieces, length)
        message = self._message(method, path, body, content_type, extra)
        connection = self._take_idle()
        if connection is not None:
            try:
                return await self._exchange(connection, message)
            except BackendError as error:
                if not (connection.silent and error.transient):
                    raise
                return await self._exchange(await self._reconnect(), message)
        return await self._exchange(await self._connect(), message)

    async def close(self) -> None:
        """Close every connection."""
        self._closed = True
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()

    def _message(self, method: str, path: str, body: bytes | None, content_type: str, extra: str) -> bytes:
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self._common_headers()}{extra}"
        if body is None:
            return f"{head}\r\n".encode("latin-1")
        head = f"{head}content-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode("latin-1") + body

    def _common_headers(self) -> str:
        """Return the headers of every request, with the number of gateways that it has passed, and its trace."""
        hops, headers = GATEWAY_HOPS.get(), self._fixed_headers + TRACE_HEADERS.get()
        return headers.replace(f"{HOPS_HEADER}: 1\r\n", f"{HOPS_HEADER}: {hops + 1}\r\n") if hops else headers

    async def _upload(
        self, method: str, path: str, content_type: str, extra: str, pieces: AsyncIterator[bytes], length: int | None
    ) -> BackendResponse:
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self._common_headers()}{extra}content-type: {content_type}\r\n{framing}\r\n\r\n"
        try:
            connection = await self._connect()
            response = connection.send(head.encode("latin-1"))
            connection.sending = True
            try:
                if await _send_pieces(connection, pieces, length):
                    connection.sending = False
                await response.receive_head()
                _check_response(response, self.origin)
            except BaseException:
                connection.abort()
                raise
        finally:
            await _close_pieces(pieces)
        return response

    async def _exchange(self, connection: BackendConnection, message: bytes) -> BackendResponse:
        response = connection.send(message)
        try:
            await response.receive_head()
            _check_response(response, self.origin)
        except BaseException:
            connection.abort()
            raise
        return response

    def _take_idle(self) -> BackendConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> BackendConnection:
        loop = asyncio.get_running_loop()
        if self._tls and self._ssl is None:
            self._ssl = await loop.run_in_executor(None, ssl.create_default_context)  # reads about 150 certificates
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: BackendConnection(self), self._host, self._port, ssl=self._ssl
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

    async def _reconnect(self) -> BackendConnection:
        """Connect again for a request that a kept connection may have delivered before it broke."""
        try:
            return await self._connect()
        except BackendUnavailable as error:
            error.unsent, error.unanswered = False, True
            raise

    def keep_connection(self, connection: BackendConnection) -> None:
        """Keep a connection whose response has ended, for the next request."""
        if self._closed or len(self._idle) >= MAX_IDLE_CONNECTIONS:
            connection.abort()
        else:
            self._idle.append(connection)

    def forget_connection(self, connection: BackendConnection) -> None:
        """Forget a connection that is closed."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


async def _send_pieces(connection: BackendConnection, pieces: AsyncIterator[bytes], length: int | None) -> bool:
    """Send a body; return False if the server responded before its end. Raises ValueError when it is not `length` bytes long."""
    sent = 0
    async for piece in pieces:
        if not piece:
            continue
        sent += len(piece)
        if length is not None and sent > length:
            raise ValueError(f"the body is longer than the {length} bytes that were announced")
        # A response that has arrived already must be read before a write finds the connection closed.
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


def _format_headers(headers: Mapping[str, str]) -> str:
    for name, value in headers.items():
        if not (name + value).isascii() or not (name + value).isprintable():
            raise ValueError(f"the header {name} holds a character that a header must not hold")
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def _check_response(response: BackendResponse, origin: str) -> None:
    """Prepare the decoding of a response. Raises BackendError for one that this client does not accept."""
    if response.status == LOOP_STATUS and HOPS_HEADER in response.headers:
        message = (
            f"{origin} is a Nexus gateway, and this worker belongs to a Nexus: its jobs would go round in circles. Give the worker the"
            " URL of the inference server itself; for a Nexus behind another one, set GATEWAY_MAX_HOPS there."
        )
        raise BackendError(info=RequestLoop(message).info)
    if response.status in REDIRECT_STATUSES:
        raise BackendError(
            f"{origin} redirects to {response.headers.get('location', 'nowhere')}; give the backend's final URL"
        )
    encoding = response.headers.get("content-encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        response.decoder = ResponseDecoder(encoding, origin, whole=response.status == 200)
