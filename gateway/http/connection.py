"""Read HTTP/1.1 on one connection, with the bounds that uvicorn's protocol lacks.

- One request is read at a time. The bytes of requests that are pipelined behind it are buffered unread, and beyond
  `MAX_PIPELINED_BYTES` the socket is not read either. Each byte is parsed once, however many requests one read brings.
- A request's head is bounded in bytes, headers and time; the framing of a chunked body (extensions, trailers) in bytes; the rest
  of a body that was not read before the answer in bytes and time. Trailers are dropped, since no handler reads them.
- A connection that is idle, or that sends only empty lines, is closed after the keep-alive timeout.
- Bytes that are not HTTP are answered with OpenAI's error object and a request id; an answer in progress is never interrupted.
- An offer to upgrade (`curl --http2`, Java's HttpClient: `Upgrade: h2c`) is declined by answering over HTTP/1.1. uvicorn
  loses the body of such a request.
- A disconnect is noticed, unless more than `MAX_PIPELINED_BYTES` are pipelined.
- A stream to an HTTP/1.0 client ends with the connection; that version has no chunked encoding.
- A request's `HttpExchange` offers what ASGI lacks, and writes tokens without it. A request whose body comes with its head, or next, is
  offered to the application's `begin`, which may serve it without a task (`docs/adr/0063`).
- During a shutdown, each answer's head has `connection: close`, which ends the connection. A connection whose answer's head was sent
  before stays open: the caller may be sending its next request already.
- `gateway.http.connection_limits` bounds the number of connections, and the time and memory that unread answers take.
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
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from backbone.ids import new_request_id
from gateway.health import ShutdownState
from gateway.http.asgi import CALLER_INFO, EXCHANGE, Caller, Scope
from gateway.http.client_addresses import group_of
from gateway.http.connection_limits import ConnectionLimiter, reset
from gateway.http.response_writer import UvicornExchange, without_chunks
from schemas.errors import HeadersTooLarge, InvalidRequest, NexusError, RequestTimeout, Unavailable

log = structlog.get_logger(__name__)

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers."""
MAX_HEADERS = 128
MAX_FRAMING_BYTES = 16 * 1024
"""Bytes of a chunked body beyond its data and `CHUNK_OVERHEAD_BYTES` for each chunk: long extensions, trailers."""
CHUNK_OVERHEAD_BYTES = 16
MAX_PIPELINED_BYTES = 64 * 1024
"""Bytes of pipelined requests that are buffered before the socket is left unread; one read (256 KiB) may exceed it once."""
SMALL_HEAD_BYTES = 8 * 1024
"""An incomplete head up to this size is never refused when heads have used up their memory."""
MAX_BLANK_BYTES = 1024
"""Empty lines between two requests."""
MAX_DISCARDED_BYTES = 32 * 1024 * 1024
"""Bytes of a body that are read and dropped after its request was answered."""
LINGER_S = 1.0
"""Delay between an error and the close of the connection: an immediate close with unread bytes could destroy the answer."""
FIRST_REQUEST_S = 0.5
"""Time for the first request on a connection that was made just before the gateway stopped listening."""
AWAITED_BODY_BYTES = 64 * 1024
AWAITED_BODY_S = 0.02
"""A body up to that size that did not come with its head is awaited so long: many HTTP clients send the two apart."""
UPGRADE_TOKENS = frozenset({b"upgrade", b"http2-settings"})
UPGRADE_HEADERS = frozenset({b"connection", *UPGRADE_TOKENS})
HEAD_END = b"\r\n\r\n"
"""End of every head and every chunked body; httptools rejects bare line feeds."""


class HttpProtocol(HttpToolsProtocol):
    """Serve one connection; the module's docstring lists the guarantees."""

    def __init__(
        self,
        *args: Any,
        head_timeout_s: float,
        shutdown_state: ShutdownState,
        limiter: ConnectionLimiter,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._shutdown_state = shutdown_state
        self._head_timeout_s = head_timeout_s
        self._limiter = limiter
        self._caller = Caller("")
        self._peer = ""
        self._proxied = False
        self._ignores_input = False
        """Whether received bytes are ignored."""
        self._in_head = False
        self._in_chunks = False
        self._head_size = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._tail = b""
        """Last bytes of an incomplete head or chunked body, since `HEAD_END` may come in two reads."""
        self._pipelined_bytes = bytearray()
        """Bytes behind the request that is being answered."""
        self._buffered_elsewhere = 0
        """Bytes that are buffered for the caller elsewhere, as reported by `HttpExchange.report_buffered`."""
        self._reading_pipelined = False
        """Whether the bytes that are being read came before the last answer was sent."""
        self._counted_bytes = 0
        """Bytes of incomplete heads and pipelined requests that `_limiter` counts for this connection."""
        self._blank_bytes = 0
        self._framing_known = False
        """Whether the framing of the current body is known: by length, or in chunks."""
        self._body_size = 0
        self._chunks = 0
        self._framing_bytes = 0
        self._discarded_bytes = 0
        self._error: NexusError | None = None
        self._unstarted = False
        """Whether the current request waits for `_start_request`."""
        self._body_timer: asyncio.TimerHandle | None = None
        """Ends the wait for a body that did not come with its head."""
        self._begin: Callable[[Scope, bytes], bool] | None = getattr(self.app, "begin", None)

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self._peer = group_of(self.client[0] if self.client else "")
        self._caller = Caller(self._peer)
        self._proxied = self._peer in self._limiter.trusted
        error = self._limiter.admit(self, self._peer)
        if error is not None:
            self._refuse_connection(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limiter.remove(self, self._peer)
        self._unset_keepalive_if_required()
        self._stop_head_timer()
        self._pipelined_bytes.clear()
        self._count(0)
        self._limiter.pipeline.remove(self)
        super().connection_lost(exc)
        self._buffered_elsewhere = 0
        self._limiter.unread.record(self, 0)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            exchange = cast("dict[str, Any]", cycle.scope).get(EXCHANGE)
            if exchange is not None:
                exchange.notify_disconnect()

    def shutdown(self) -> None:
        """Close the connection as the server stops; a connection without a request yet gets a moment to send one."""
        if self.cycle is None and not self.transport.is_closing():
            self.loop.call_later(FIRST_REQUEST_S, self._shut_down_if_idle)
        else:
            super().shutdown()

    def _shut_down_if_idle(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def close_after_answer(self) -> None:
        """End the connection with its current answer, if the answer's head is not sent yet. The gateway shuts down."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_started:
            cycle.keep_alive = False

    def end_call_of(self, key_id: str, error: NexusError) -> None:
        """End the call that is open with this key, as `end_call` does."""
        if self._caller.key_id == key_id and self.cycle is not None:
            self.end_call(self.cycle, error)

    def end_call(self, cycle: RequestResponseCycle, error: NexusError) -> None:
        """End a call as `gateway.http.asgi.HttpExchange` describes."""
        if cycle is not self.cycle or cycle.response_complete or self.transport.is_closing():
            return
        if cycle.response_started or self._ignores_input:
            reset(self.transport)
            return
        cycle.disconnected = True
        cycle.message_event.set()
        exchange = cast("dict[str, Any]", cycle.scope).get(EXCHANGE)
        if exchange is not None:
            exchange.notify_disconnect()
        self._stop_head_timer()
        self._send_error(error)
        self._close_late()

    def pause_writing(self) -> None:
        """Report unread bytes, as the transport's buffer is full."""
        super().pause_writing()
        self.report_unread(self._buffered_elsewhere)

    def resume_writing(self) -> None:
        """Report unread bytes, as the transport's buffer has emptied."""
        super().resume_writing()
        self._limiter.unread.record(self, self._buffered_elsewhere)

    def report_unread(self, size: int) -> None:
        """Report bytes as `gateway.http.asgi.HttpExchange.report_buffered` describes."""
        self._buffered_elsewhere = size
        buffered = self.transport.get_write_buffer_size() if self.flow.write_paused else 0
        self._limiter.unread.record(self, buffered + size)

    @property
    def owner(self) -> str:
        """The owner for whom the connection's unread bytes count: of the last key, or else the address."""
        return self._caller.owner or self._caller.address

    def shed(self) -> None:
        """Drop what the caller has not read, and close the connection."""
        log.warning("connection.shed", owner=self.owner, unread=self.transport.get_write_buffer_size())
        reset(self.transport)

    # Reading

    def data_received(self, data: bytes) -> None:
        """Read one request; buffer the bytes behind it until it was answered."""
        if self._ignores_input:
            return
        read = 0 if self._pipelined_bytes else self._read(data)
        if self._ignores_input:
            return
        if read < len(data):
            self._buffer_pipelined(data[read:])
        elif self._in_head:
            self._bound_head()

    def _read(self, data: bytes | bytearray) -> int:
        """Feed the parser until a request is complete. Returns how many bytes were parsed."""
        start, end = 0, len(data)
        while start < end and not self._is_answering():
            stop = self._stop(data, start)
            if self._ignores_input:
                return end
            start += self._feed(bytes(data) if stop - start == end else bytes(data[start:stop]))
            if self._unstarted and not self._awaits_body():
                self._start_request()
            if self._ignores_input:
                return end
        if self._in_head or self._in_chunks:
            self._tail = (self._tail + bytes(data[max(0, start - 3) : start]))[-3:]
        elif self._tail:
            self._tail = b""
        return start

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ARG002 - as uvicorn calls it
        """Leave the start of the request to `_start_request`, since its body may be here already."""
        self._unstarted = True

    def _awaits_body(self) -> bool:
        """Return whether the body of the current request has not come yet, and will probably be the next that comes."""
        cycle = self.cycle
        if (
            self._body_timer is not None
            or self._begin is None
            or not cycle.more_body
            or self.expect_100_continue
            or not 0 < _content_length(cycle.scope["headers"]) <= AWAITED_BODY_BYTES
        ):
            return False
        self._body_timer = self.loop.call_later(AWAITED_BODY_S, self._start_request)
        return True

    def _start_request(self) -> None:
        """Begin the request at once if its body has arrived and the app can do so; call the app in a task otherwise."""
        self._unstarted = False
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        cycle = self.cycle
        if (
            cycle.more_body
            or cycle.disconnected
            or self._begin is None
            or not self._begin(cast("Scope", cycle.scope), bytes(cycle.body))
        ):
            self.call_app()

    def call_app(self) -> None:
        """Call the ASGI app for the current request, in a task."""
        super()._start_asgi_task(self.cycle, self.app)

    def _is_answering(self) -> bool:
        """Return whether a request is complete, and its answer is not."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def _in_sized_body(self) -> bool:
        """Return whether the next byte belongs to a body of known length."""
        cycle = self.cycle
        return cycle is not None and cycle.more_body and not self._in_head and not self._in_chunks

    def _stop(self, data: bytes | bytearray, start: int) -> int:
        """Return up to where to feed the parser, so that it meets the end of one request at most. May refuse a head."""
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
        if self._head_size > MAX_HEAD_BYTES:
            self._refuse(HeadersTooLarge(f"The request's line and headers are larger than {MAX_HEAD_BYTES} bytes."))
        # Only one end: behind this head there is its body, or the beginning of another head.
        return stop if data.find(HEAD_END, stop) >= 0 else len(data)

    def _feed(self, piece: bytes) -> int:
        """Feed the parser. Returns how many bytes were parsed."""
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
            self._refuse(error or InvalidRequest("This is not a valid HTTP/1.1 request.", code="invalid_http"))
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
        """Count empty lines between two requests, and refuse too many."""
        self._head_size = 0
        self._blank_bytes += size
        if self._blank_bytes > MAX_BLANK_BYTES:
            self._refuse(InvalidRequest("This is not a valid HTTP/1.1 request.", code="invalid_http"))

    def _bound_body(self, size: int, data: int) -> None:
        """Count `size` bytes of an incomplete body, `data` of them content, and refuse too much framing."""
        cycle = self.cycle
        if not self._framing_known:
            self._framing_known = True
            coding = _transfer_coding(cycle.scope["headers"])
            self._in_chunks = coding is not None
            if coding is not None and (coding != b"chunked" or cycle.scope["http_version"] != "1.1"):
                message = "The only transfer coding is 'chunked', and only in HTTP/1.1. Send a Content-Length instead."
                self._refuse(InvalidRequest(message, code="invalid_http"))
                return
            size = 0  # its head was among them
        if self._in_chunks:
            self._framing_bytes = max(0, self._framing_bytes + size - data - CHUNK_OVERHEAD_BYTES * self._chunks)
            if self._framing_bytes > MAX_FRAMING_BYTES:
                message = f"The body's chunk extensions or trailers are larger than {MAX_FRAMING_BYTES} bytes."
                self._refuse(InvalidRequest(message, code="invalid_http"))
        if cycle.response_complete:
            self._discarded_bytes += size
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self._close_late()

    def _buffer_pipelined(self, data: bytes) -> None:
        """Buffer the bytes of later requests, and stop reading the socket beyond the bounds."""
        self._stop_head_timer()
        self._pipelined_bytes += data
        flow = cast("_Flow", self.flow)
        if not self._count(len(self._pipelined_bytes)) or len(self._pipelined_bytes) > MAX_PIPELINED_BYTES:
            flow.full = True
            flow.pause_reading()

    def read_next_request(self) -> None:
        """Read the next pipelined request."""
        if self._ignores_input or self.transport.is_closing():
            return
        pipelined = self._pipelined_bytes
        self._reading_pipelined = True
        del pipelined[: self._read(pipelined)]
        self._reading_pipelined = False
        flow = cast("_Flow", self.flow)
        if len(pipelined) <= MAX_PIPELINED_BYTES:
            flow.full = False
            flow.resume_reading()
        self._count(len(pipelined))
        if self._in_head and not pipelined:
            self._bound_head()

    def _count(self, size: int) -> bool:
        """Count `size` buffered bytes for this connection. Returns False if all connections together buffer too many."""
        limiter = self._limiter
        limiter.stored += size - self._counted_bytes
        self._counted_bytes = size
        return limiter.stored <= limiter.bounds.max_stored

    # Callbacks of the parser

    def on_headers_complete(self) -> None:
        """Begin the request whose head is complete, unless it offers an upgrade."""
        if len(self.headers) > MAX_HEADERS:
            self._error = HeadersTooLarge(f"The request has more than {MAX_HEADERS} headers.")
            raise self._error
        self._in_head = self._framing_known = False
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        if self._counted_bytes:
            self._count(0)
        if self._is_answering():
            raise InvalidRequest  # unreachable, as `_stop` finds each end; uvicorn would lose the request that is being answered
        self._head_size = self._blank_bytes = self._body_size = self._framing_bytes = self._discarded_bytes = 0
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is None or cycle.scope is not self.scope:
            return
        scope = cast("dict[str, Any]", self.scope)
        if self._proxied:
            self._caller = Caller(self._limiter.trusted.caller(self._peer, self.headers))
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
        """Note that a head begins."""
        self._in_head = True
        super().on_message_begin()

    def on_chunk_header(self) -> None:
        """Count a chunk."""
        self._chunks += 1

    def on_body(self, body: bytes) -> None:
        """Buffer a piece of the body for the handler; drop it if the request was answered."""
        cycle = self.cycle
        self._body_size += len(body)
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """Note that the request is complete. For an offer to upgrade, the parser calls this after its head."""
        self._in_chunks = False
        cycle = self.cycle
        if cycle is not None:
            cycle.more_body = False
            cycle.message_event.set()

    def on_response_complete(self) -> None:
        """Read the next request, or the rest of this one's body, as the answer was sent."""
        super().on_response_complete()
        if self.transport.is_closing() or self._ignores_input:
            return
        cycle = self.cycle
        if cycle.more_body:
            if self.expect_100_continue and not self._body_size:
                self._close_late()  # the caller may send the body or not, so that the next bytes are ambiguous
                return
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(self._head_timeout_s, self.timeout_keep_alive_handler)
        elif self._pipelined_bytes:
            self._limiter.pipeline.enqueue(self)
        elif self._in_head:
            self._bound_head()

    # The head

    def _bound_head(self) -> None:
        """Refuse an incomplete head that is too large, or start its timer."""
        if len(self.headers) > MAX_HEADERS:
            self._refuse(HeadersTooLarge(f"The request has more than {MAX_HEADERS} headers."))
        elif not self._count(self._head_size) and self._head_size > SMALL_HEAD_BYTES:
            message = "Too many requests with incomplete headers are open. Send the headers in one piece, or retry."
            self._refuse(Unavailable(message))
        elif self._head_timer is None and not self._is_answering():
            self._head_timer = self.loop.call_later(self._head_timeout_s, self._head_too_late)

    def _head_too_late(self) -> None:
        self._head_timer = None
        self._refuse(RequestTimeout(f"The request's headers did not arrive within {self._head_timeout_s:g} s."))

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # Upgrades

    def _should_upgrade(self) -> bool:
        """Return true for an offer, so that uvicorn leaves the request to `_decline_upgrade`."""
        return self._get_upgrade() is not None

    def _decline_upgrade(self) -> None:
        """Parse the head again without its offer to upgrade."""
        if self._get_upgrade() is None:  # CONNECT
            self._refuse(InvalidRequest("CONNECT is not supported: Nexus is not a proxy.", code="invalid_http"))
            return
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] not in UPGRADE_HEADERS]
        options = {o.strip().lower() for n, v in self.headers if n == b"connection" for o in v.split(b",")}
        lines.append(b"connection: " + b", ".join(sorted(options - UPGRADE_TOKENS)))
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join(lines) + HEAD_END)

    # Refusals

    def _refuse(self, error: NexusError) -> None:
        """Answer with an error and close. While an earlier request is being answered, close after that answer instead."""
        if self.transport.is_closing() or self._ignores_input:
            return
        self._ignores_input = True
        self._stop_head_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or not cycle.more_body:
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
        elif self._reading_pipelined or (cycle is not None and cycle.more_body):
            self._close_late()  # every earlier request was answered
            return
        self._send_error(error)
        self._close_late()

    def _refuse_connection(self, error: NexusError) -> None:
        """Answer a connection beyond the limits with an error, or abort it if too many of them linger."""
        self._ignores_input = True
        if self._limiter.may_linger:
            self._send_error(error)
            self._close_late()
        else:
            self.transport.abort()

    def _send_error(self, error: NexusError) -> None:
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
        """Stop to send, and close after `LINGER_S`."""
        self._ignores_input = True
        self._unset_keepalive_if_required()
        self._pipelined_bytes.clear()
        self._count(0)
        cast("_Flow", self.flow).full = False
        self.flow.resume_reading()
        self.transport.write_eof()
        self.timeout_keep_alive_task = self.loop.call_later(LINGER_S, self.timeout_keep_alive_handler)


class _Flow(FlowControl):
    """Keeps a socket paused while too many bytes are pipelined, also when uvicorn resumes it."""

    full = False

    def resume_reading(self) -> None:
        if not self.full:
            super().resume_reading()


def _content_length(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the length of a body; httptools has validated it."""
    return next((int(value) for name, value in headers if name == b"content-length"), 0)


def _transfer_coding(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    return next((value.strip().lower() for name, value in headers if name == b"transfer-encoding"), None)


def http_protocol(
    head_timeout_s: float, shutdown_state: ShutdownState, limiter: ConnectionLimiter
) -> type[asyncio.Protocol]:
    """Return the protocol factory for uvicorn's `http` option."""
    factory: Callable[..., asyncio.Protocol] = functools.partial(
        HttpProtocol, head_timeout_s=head_timeout_s, shutdown_state=shutdown_state, limiter=limiter
    )
    return cast("type[asyncio.Protocol]", factory)
