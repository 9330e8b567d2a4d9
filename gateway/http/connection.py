"""Read HTTP/1.1 on one connection, with the bounds that uvicorn's protocol lacks.

- One request is read at a time. The bytes of requests pipelined behind it are stored unread, and beyond `MAX_AHEAD` the
  socket is not read either. Each byte is looked at once, however many requests one read brings.
- A request's head is bounded in bytes, headers and time, the framing of a chunked body (extensions, trailers) in bytes, and
  what is left of a body that the answer did not wait for in bytes and time. Trailers are dropped: nothing reads them.
- A connection that is idle, or that brings nothing but empty lines, is closed after the keep-alive timeout.
- What is not HTTP is answered with OpenAI's error object and a request id; an answer in progress is never cut into.
- An offer to upgrade (`curl --http2`, Java's HttpClient: `Upgrade: h2c`) is declined by answering over HTTP/1.1. uvicorn
  loses the body of such a request.
- A caller who hangs up is heard, unless more than `MAX_AHEAD` is pipelined.
- A stream to an HTTP/1.0 client ends with the connection; that version does not know chunks.
- A request's `HttpExchange` tells what ASGI does not, and writes tokens without it.
- A gateway that is leaving tells each caller so in its answer's head, which then ends the connection. One whose head has gone out
  is kept: the caller may be sending its next request already.
- Who connects, how long an unread answer is held, and how much memory unread answers take: `gateway.http.connection_limits`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import httptools
import orjson
import structlog
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from backbone.ids import new_request_id
from gateway.health import ShutdownState
from gateway.http.asgi import CALLER_INFO, EXCHANGE, Caller
from gateway.http.client_addresses import group_of
from gateway.http.connection_limits import ConnectionLimiter, reset
from gateway.http.response_writer import UvicornExchange, without_chunks
from schemas.errors import HeadersTooLarge, InvalidRequest, NexusError, RequestTimeout, Unavailable

log = structlog.get_logger(__name__)

MAX_HEAD = 64 * 1024
"""Bytes of request line and headers."""
MAX_HEADERS = 128
MAX_FRAMING = 16 * 1024
"""Bytes that a chunked body may take beyond its data and `CHUNK_ALLOWANCE` for each chunk: long extensions, trailers."""
CHUNK_ALLOWANCE = 16
MAX_AHEAD = 64 * 1024
"""Bytes of pipelined requests that are stored before the socket is left unread; one read (256 KiB) may exceed it once."""
SMALL_HEAD = 8 * 1024
"""A head that is not complete keeps its place up to this size when heads take all the memory they may."""
MAX_BLANK = 1024
"""Bytes of empty lines between two requests."""
MAX_UNWANTED = 32 * 1024 * 1024
"""Bytes of a body that are read and dropped after its request has been answered."""
LINGER_S = 1.0
"""After a refusal, before the connection closes: closing at once, with bytes unread, could take the answer along."""
FIRST_WORD_S = 0.5
"""For the first request on a connection that was made just before the gateway stopped listening."""
UPGRADE_TOKENS = frozenset({b"upgrade", b"http2-settings"})
UPGRADE_HEADERS = frozenset({b"connection", *UPGRADE_TOKENS})
HEAD_END = b"\r\n\r\n"
"""Every head, and every chunked body, ends with it; httptools refuses bare line feeds."""


class HttpProtocol(HttpToolsProtocol):
    """Serve one connection; the module's docstring lists the guarantees."""

    def __init__(
        self,
        *args: Any,
        head_timeout_s: float,
        shutdown_state: ShutdownState,
        connections: ConnectionLimiter,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._shutdown_state = shutdown_state
        self._head_timeout_s = head_timeout_s
        self._connections = connections
        self._caller = Caller("")
        self._peer = ""
        self._proxied = False
        self._deaf = False
        """Nothing that comes is read any more."""
        self._in_head = False
        self._in_chunks = False
        self._head_size = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._tail = b""
        """The last bytes of an incomplete head or chunked body: `HEAD_END` may come in two reads."""
        self._ahead = bytearray()
        """What came behind a request that is being answered."""
        self._held_ahead = 0
        """Bytes that are stored for the caller elsewhere, as `HttpExchange.report_buffered` was told."""
        self._pipelined = False
        """What is being read came before the last answer had gone."""
        self._counted = 0
        """Bytes of incomplete heads and pipelined requests that `_connections` counts for this connection."""
        self._blank = 0
        self._framed = False
        """Whether it is known how the end of this body is found."""
        self._body_size = 0
        self._chunks = 0
        self._framing = 0
        self._unwanted = 0
        self._error: NexusError | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self._peer = group_of(self.client[0] if self.client else "")
        self._caller = Caller(self._peer)
        self._proxied = self._peer in self._connections.trusted
        error = self._connections.enter(self, self._peer)
        if error is not None:
            self._turn_away(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.leave(self, self._peer)
        self._unset_keepalive_if_required()
        self._stop_head_timer()
        self._ahead.clear()
        self._count(0)
        self._connections.turns.leave(self)
        super().connection_lost(exc)
        self._held_ahead = 0
        self._connections.unread.record(self, 0)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            line = cast("dict[str, Any]", cycle.scope).get(EXCHANGE)
            if line is not None:
                line.gone()

    def shutdown(self) -> None:
        """The server stops. Who has connected and said nothing yet is about to: it gets the time to."""
        if self.cycle is None and not self.transport.is_closing():
            self.loop.call_later(FIRST_WORD_S, self._shut_unless_asked)
        else:
            super().shutdown()

    def _shut_unless_asked(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def leave(self) -> None:
        """The gateway is leaving: this connection ends with the answer that is being made, if its head can still say so."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_started:
            cycle.keep_alive = False

    def pause_writing(self) -> None:
        """The transport's buffer is full."""
        super().pause_writing()
        self.report_unread(self._held_ahead)

    def resume_writing(self) -> None:
        """The transport's buffer has emptied."""
        super().resume_writing()
        self._connections.unread.record(self, self._held_ahead)

    def report_unread(self, size: int) -> None:
        """See `gateway.http.asgi.HttpExchange.report_buffered`."""
        self._held_ahead = size
        buffered = self.transport.get_write_buffer_size() if self.flow.write_paused else 0
        self._connections.unread.record(self, buffered + size)

    @property
    def owner(self) -> str:
        """Who the unread bytes of this connection count for."""
        return self._caller.owner or self._caller.address

    def shed(self) -> None:
        """Drop what the caller has not read. The connection ends with it."""
        log.warning("connection.shed", owner=self.owner, unread=self.transport.get_write_buffer_size())
        reset(self.transport)

    # Reading

    def data_received(self, data: bytes) -> None:
        """Read one request; store what is behind it until it has been answered."""
        if self._deaf:
            return
        read = 0 if self._ahead else self._read(data)
        if self._deaf:
            return
        if read < len(data):
            self._store_ahead(data[read:])
        elif self._in_head:
            self._bound_head()

    def _read(self, data: bytes | bytearray) -> int:
        """Feed the parser until a request waits for its answer. Returns how much was read."""
        start, end = 0, len(data)
        while start < end and not self._is_answering():
            stop = self._stop(data, start)
            if self._deaf:
                return end
            start += self._feed(bytes(data) if stop - start == end else bytes(data[start:stop]))
            if self._deaf:
                return end
        if self._in_head or self._in_chunks:
            self._tail = (self._tail + bytes(data[max(0, start - 3) : start]))[-3:]
        elif self._tail:
            self._tail = b""
        return start

    def _is_answering(self) -> bool:
        """Whether a request has come as a whole, and its answer has not gone as a whole."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def _in_sized_body(self) -> bool:
        """Whether the next byte belongs to a body of known length."""
        cycle = self.cycle
        return cycle is not None and cycle.more_body and not self._in_head and not self._in_chunks

    def _stop(self, data: bytes | bytearray, start: int) -> int:
        """Return how far to feed the parser, so that it meets the end of one request at most. May refuse a head."""
        if start == 0 and self._tail:
            seam = (self._tail + data[:3]).find(HEAD_END)
            if seam >= 0:
                return seam + len(HEAD_END) - len(self._tail)
        found = data.find(HEAD_END, start)
        if self._in_sized_body():
            if found < 0:
                return len(data)
            left = _content_length(self.cycle.scope["headers"]) - self._body_size
            return min(len(data), start + max(1, left))
        stop = len(data) if found < 0 else found + len(HEAD_END)
        if self._in_chunks:
            return stop
        self._head_size += stop - start
        if self._head_size > MAX_HEAD:
            self._refuse(HeadersTooLarge(f"the request's line and headers are larger than {MAX_HEAD} bytes"))
        # One end alone: behind this head there is its body, or the beginning of another head.
        return stop if data.find(HEAD_END, stop) >= 0 else len(data)

    def _feed(self, piece: bytes) -> int:
        """Let the parser read. Returns how much of it was read."""
        before, was_body = self.cycle, self.cycle is not None and self.cycle.more_body
        body_size, self._chunks = self._body_size, 0
        read = len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade()
            return int(upgrade.args[0])
        except httptools.HttpParserError:
            error, self._error = self._error, None
            self._refuse(error or InvalidRequest("this is not a valid HTTP/1.1 request", code="invalid_http"))
            return read
        data = self._body_size - (body_size if self.cycle is before else 0)
        if self._in_head:
            self._head_size = self._head_size or max(1, read - data)
        elif not self._is_answering():
            if self.cycle is not None and self.cycle.more_body:
                self._bound_body(read, data)
            elif not was_body:
                self._bound_blank(read)
        return read

    def _bound_blank(self, size: int) -> None:
        """Between two requests a few empty lines are passed over."""
        self._head_size = 0
        self._blank += size
        if self._blank > MAX_BLANK:
            self._refuse(InvalidRequest("this is not a valid HTTP/1.1 request", code="invalid_http"))

    def _bound_body(self, size: int, data: int) -> None:
        """`size` bytes came of a body that is not complete, `data` of them its own."""
        cycle = self.cycle
        if not self._framed:
            self._framed = True
            coding = _transfer_coding(cycle.scope["headers"])
            self._in_chunks = coding is not None
            if coding is not None and (coding != b"chunked" or cycle.scope["http_version"] != "1.1"):
                message = "the only transfer coding is 'chunked', and HTTP/1.0 has none; send a Content-Length"
                self._refuse(InvalidRequest(message, code="invalid_http"))
                return
            size = 0  # its head was among them
        if self._in_chunks:
            self._framing = max(0, self._framing + size - data - CHUNK_ALLOWANCE * self._chunks)
            if self._framing > MAX_FRAMING:
                message = f"this body's chunk extensions or trailers are larger than {MAX_FRAMING} bytes"
                self._refuse(InvalidRequest(message, code="invalid_http"))
        if cycle.response_complete:
            self._unwanted += size
            if self._unwanted > MAX_UNWANTED:
                self._close_late()

    def _store_ahead(self, data: bytes) -> None:
        """Store what belongs to later requests, and stop reading the socket beyond the bounds."""
        self._stop_head_timer()
        self._ahead += data
        flow = cast("_Flow", self.flow)
        if not self._count(len(self._ahead)) or len(self._ahead) > MAX_AHEAD:
            flow.full = True
            flow.pause_reading()

    def read_on(self) -> None:
        """Read the next of the requests that came ahead of their turn."""
        if self._deaf or self.transport.is_closing():
            return
        ahead = self._ahead
        self._pipelined = True
        del ahead[: self._read(ahead)]
        self._pipelined = False
        flow = cast("_Flow", self.flow)
        if len(ahead) <= MAX_AHEAD:
            flow.full = False
            flow.resume_reading()
        self._count(len(ahead))
        if self._in_head and not ahead:
            self._bound_head()

    def _count(self, size: int) -> bool:
        """Let `size` bytes of this connection count among those that are stored. False: they are too many in all."""
        connections = self._connections
        connections.stored += size - self._counted
        self._counted = size
        return connections.stored <= connections.bounds.max_stored

    # What the parser finds

    def on_headers_complete(self) -> None:
        """The head is complete: its request begins, unless it offers an upgrade."""
        if len(self.headers) > MAX_HEADERS:
            self._error = HeadersTooLarge(f"the request has more than {MAX_HEADERS} headers")
            raise self._error
        self._in_head = self._framed = False
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        if self._counted:
            self._count(0)
        if self._is_answering():
            raise InvalidRequest  # never, as `_stop` sees each end; uvicorn would lose sight of the request that is answered
        self._head_size = self._blank = self._body_size = self._framing = self._unwanted = 0
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is None or cycle.scope is not self.scope:
            return
        scope = cast("dict[str, Any]", self.scope)
        if self._proxied:
            self._caller = Caller(self._connections.trusted.caller(self._peer, self.headers))
        scope[EXCHANGE], scope[CALLER_INFO] = UvicornExchange(cycle, self), self._caller
        self.headers = []  # trailers, which come as headers do, are not this request's
        if self._shutdown_state.begun:
            cycle.keep_alive = False
        version = self.scope["http_version"]
        if version != "1.1":
            if version != "1.0":
                raise InvalidRequest
            cycle.send = without_chunks(cycle)  # type: ignore[method-assign,assignment]

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = True
        super().on_message_begin()

    def on_chunk_header(self) -> None:
        """A chunk begins."""
        self._chunks += 1

    def on_body(self, body: bytes) -> None:
        """Some of the body has come."""
        cycle = self.cycle
        self._body_size += len(body)
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """The request has come as a whole. Of an offer to upgrade, only its head has, and the last request is complete."""
        self._in_chunks = False
        cycle = self.cycle
        if cycle is not None:
            cycle.more_body = False
            cycle.message_event.set()

    def on_response_complete(self) -> None:
        """The answer has gone: read the next request, or what is left of this one's body."""
        super().on_response_complete()
        if self.transport.is_closing() or self._deaf:
            return
        cycle = self.cycle
        if cycle.more_body:
            if self.expect_100_continue and not self._body_size:
                self._close_late()  # whether the body comes is for the caller to say: what comes next is ambiguous
                return
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(self._head_timeout_s, self.timeout_keep_alive_handler)
        elif self._ahead:
            self._connections.turns.wait(self)
        elif self._in_head:
            self._bound_head()

    # The head

    def _bound_head(self) -> None:
        """A head is not complete yet."""
        if len(self.headers) > MAX_HEADERS:
            self._refuse(HeadersTooLarge(f"the request has more than {MAX_HEADERS} headers"))
        elif not self._count(self._head_size) and self._head_size > SMALL_HEAD:
            message = "too many requests wait for the rest of their headers; send yours in one piece, or try again"
            self._refuse(Unavailable(message))
        elif self._head_timer is None and not self._is_answering():
            self._head_timer = self.loop.call_later(self._head_timeout_s, self._head_too_late)

    def _head_too_late(self) -> None:
        self._head_timer = None
        self._refuse(RequestTimeout(f"the request's headers did not arrive within {self._head_timeout_s:g} s"))

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # Upgrades

    def _should_upgrade(self) -> bool:
        """What uvicorn asks; true, so that it leaves the request alone and `_decline_upgrade` gets it."""
        return self._get_upgrade() is not None

    def _decline_upgrade(self) -> None:
        """Read the head once more, without its offer."""
        if self._get_upgrade() is None:  # CONNECT
            self._refuse(InvalidRequest("this is not a proxy", code="invalid_http"))
            return
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] not in UPGRADE_HEADERS]
        options = {o.strip().lower() for n, v in self.headers if n == b"connection" for o in v.split(b",")}
        lines.append(b"connection: " + b", ".join(sorted(options - UPGRADE_TOKENS)))
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join(lines) + HEAD_END)

    # Refusals

    def _refuse(self, error: NexusError) -> None:
        """Answer and close. While an earlier request is being answered, only let that be the last one."""
        if self.transport.is_closing() or self._deaf:
            return
        self._deaf = True
        self._stop_head_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or not cycle.more_body:
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
        elif self._pipelined or (cycle is not None and cycle.more_body):
            self._close_late()  # what was asked for in order has been answered
            return
        self._answer(error)
        self._close_late()

    def _turn_away(self, error: NexusError) -> None:
        """There are too many connections."""
        self._deaf = True
        if self._connections.may_linger:
            self._answer(error)
            self._close_late()
        else:
            self.transport.abort()

    def _answer(self, error: NexusError) -> None:
        info, request_id = error.info, new_request_id()
        log.info("request.refused", request_id=request_id, status=info.status, error=info.message)
        body = orjson.dumps(info.body())
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": request_id,
            "connection": "close",
        }
        head = b"".join(f"{name}: {value}\r\n".encode() for name, value in (info.headers() | headers).items())
        self.transport.write(STATUS_LINE[info.status] + head + b"\r\n" + body)

    def _close_late(self) -> None:
        """Send no more, and close a moment later: closing with bytes unread could take the answer along."""
        self._deaf = True
        self._unset_keepalive_if_required()
        self._ahead.clear()
        self._count(0)
        cast("_Flow", self.flow).full = False
        self.flow.resume_reading()
        self.transport.write_eof()
        self.timeout_keep_alive_task = self.loop.call_later(LINGER_S, self.timeout_keep_alive_handler)


class _Flow(FlowControl):
    """Leaves a socket unread while more is pipelined than may be stored, whoever asks for it to be read."""

    full = False

    def resume_reading(self) -> None:
        if not self.full:
            super().resume_reading()


def _content_length(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """What httptools has checked."""
    return next((int(value) for name, value in headers if name == b"content-length"), 0)


def _transfer_coding(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    return next((value.strip().lower() for name, value in headers if name == b"transfer-encoding"), None)


def http_protocol(
    head_timeout_s: float, shutdown_state: ShutdownState, connections: ConnectionLimiter
) -> type[asyncio.Protocol]:
    """What uvicorn is to make for each connection."""
    factory: Callable[..., asyncio.Protocol] = functools.partial(
        HttpProtocol, head_timeout_s=head_timeout_s, shutdown_state=shutdown_state, connections=connections
    )
    return cast("type[asyncio.Protocol]", factory)
