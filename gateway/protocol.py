"""uvicorn's HTTP/1.1 protocol, with what it lacks.

- A request's head is bounded in size and in time, and a connection that says nothing is closed.
- What is not HTTP is answered with OpenAI's error object and a request id; an answer in progress is never cut into.
- An offer to upgrade (`curl --http2`, Java's HttpClient: `Upgrade: h2c`) is declined by answering over HTTP/1.1. uvicorn
  loses the body of such a request.
- A caller who hangs up is heard, also with several requests under way on the connection.
- A stream to an HTTP/1.0 client ends with the connection; that version does not know chunks.
- A request's `Line` tells what ASGI does not, and writes tokens without it.
- A gateway that is leaving tells each caller so in its answer's head, which then ends the connection. One whose head has gone out
  is kept: the caller may be sending its next request already.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, cast

import httptools
import orjson
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from backbone.ids import new_request_id
from gateway.http import LINE, Send
from gateway.leaving import Leaving
from schemas.errors import HeadersTooLarge, InvalidRequest, NexusError, RequestTimeout

log = structlog.get_logger(__name__)

MAX_HEAD = 64 * 1024
"""Bytes of request line and headers; what one read brings may exceed it once."""
FIRST_WORD_S = 0.5
"""For the first request on a connection that was made just before the gateway stopped listening."""
MAX_PIPELINED = 16
UPGRADE_TOKENS = frozenset({b"upgrade", b"http2-settings"})
UPGRADE_HEADERS = frozenset({b"connection", *UPGRADE_TOKENS})


class HttpProtocol(HttpToolsProtocol):
    """See the module's docstring. One instance per connection."""

    def __init__(self, *args: Any, head_timeout_s: float, leaving: Leaving, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leaving = leaving
        self._head_timeout_s = head_timeout_s
        self._in_head = False
        self._head_size = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._earlier: list[RequestResponseCycle] = []
        """Requests still to be answered before the newest one, which is all that uvicorn remembers."""

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_keepalive_if_required()
        self._stop_head_timer()
        super().connection_lost(exc)
        for cycle in self._earlier:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        for cycle in (*self._earlier, self.cycle):
            if cycle is not None and not cycle.response_complete:
                line = cast("dict[str, Any]", cycle.scope).get(LINE)
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

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._in_head:
            self._head_size += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(InvalidRequest("this is not a valid HTTP/1.1 request", code="invalid_http"))
        if self._in_head:
            self._bound_head()

    # The head

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_size = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        previous = self.cycle
        super().on_headers_complete()
        cycle = self.cycle
        if previous is not None and previous is not cycle and not previous.response_complete:
            self._pipelined(previous)
        if cycle is None or cycle.scope is not self.scope:
            return
        cast("dict[str, Any]", self.scope)[LINE] = CycleLine(cycle)
        if self._leaving.begun:
            cycle.keep_alive = False
        if self.scope["http_version"] == "1.0":
            cycle.send = _without_chunks(cycle)  # type: ignore[method-assign,assignment]

    def _bound_head(self) -> None:
        if self._head_size > MAX_HEAD:
            self._in_head = False
            self._refuse(HeadersTooLarge(f"the request's line and headers are larger than {MAX_HEAD} bytes"))
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_timeout_s, self._head_too_late)

    def _head_too_late(self) -> None:
        self._head_timer = None
        self._refuse(RequestTimeout(f"the request's headers did not arrive within {self._head_timeout_s:g} s"))

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _pipelined(self, previous: RequestResponseCycle) -> None:
        """A request came before the last one was answered. Reading goes on within reason: only a reader hears a hang-up."""
        self._earlier = [*(cycle for cycle in self._earlier if not cycle.response_complete), previous]
        if len(self._earlier) <= MAX_PIPELINED:
            self.flow.resume_reading()

    # Upgrades

    def _should_upgrade(self) -> bool:
        """What uvicorn asks; true, so that it leaves the request alone and `_decline_upgrade` gets it."""
        return self._get_upgrade() is not None

    def _decline_upgrade(self, rest: bytes) -> None:
        """Read the request once more, without its offer; `rest` follows its head."""
        if self._get_upgrade() is None:  # CONNECT
            self._refuse(InvalidRequest("this is not a proxy", code="invalid_http"))
            return
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] not in UPGRADE_HEADERS]
        options = {o.strip().lower() for n, v in self.headers if n == b"connection" for o in v.split(b",")}
        lines.append(b"connection: " + b", ".join(sorted(options - UPGRADE_TOKENS)))
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    # Refusals

    def _refuse(self, error: NexusError) -> None:
        """Answer and close. While an earlier request is being answered, only let that be the last one."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and (cycle.response_started or not cycle.more_body):
            cycle.keep_alive = False
            return
        info, request_id = error.info, new_request_id()
        log.info("request refused", request_id=request_id, status=info.status, error=info.message)
        body = orjson.dumps(info.body())
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": request_id,
            "connection": "close",
        }
        head = b"".join(f"{name}: {value}\r\n".encode() for name, value in (info.headers() | headers).items())
        self.transport.write(STATUS_LINE[info.status] + head + b"\r\n" + body)
        self.transport.close()


class CycleLine:
    """See `gateway.http.Line`. It skips ASGI for what is done once per token, and a task for what is heard once."""

    __slots__ = ("_callback", "_cycle")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._callback: Callable[[], None] | None = None

    @property
    def body_complete(self) -> bool:
        return not self._cycle.more_body

    def on_gone(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback
        # A large body leaves reading paused, and only a reader hears a hang-up.
        self._cycle.flow.resume_reading()
        if self._cycle.disconnected:
            self.gone()

    def gone(self) -> None:
        """The connection is lost."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def push(self, data: bytes) -> bool:
        cycle = self._cycle
        if cycle.flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def cut(self) -> None:
        self._cycle.disconnected = True
        self._cycle.transport.close()

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        cycle = self._cycle
        transport, gathered = cycle.transport, _Gathered(cycle.transport)
        cycle.transport = cast("asyncio.Transport", gathered)
        try:
            yield
        finally:
            cycle.transport = transport
            gathered.flush()


class _Gathered:
    """A transport that keeps what is written until it is flushed or closed."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(b"".join(parts))

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def http_protocol(head_timeout_s: float, leaving: Leaving) -> type[asyncio.Protocol]:
    """What uvicorn is to make for each connection."""
    factory: Callable[..., asyncio.Protocol] = functools.partial(
        HttpProtocol, head_timeout_s=head_timeout_s, leaving=leaving
    )
    return cast("type[asyncio.Protocol]", factory)


def _without_chunks(cycle: RequestResponseCycle) -> Send:
    """`cycle.send`, where an answer without a Content-Length ends with its connection."""
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
