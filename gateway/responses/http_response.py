"""How a caller gets a response: whole, or event by event; and what happens when it hangs up."""

from __future__ import annotations

from contextlib import aclosing, suppress
from enum import Enum
from time import monotonic
from typing import Any

import structlog
from fastapi.responses import Response

from gateway.http.asgi import (
    EXCHANGE,
    STREAM_HEADERS,
    HttpExchange,
    Receive,
    Reply,
    Scope,
    Send,
    adapted_header,
    request_id_of,
    to_error_info,
)
from gateway.http.request_body import CallerDisconnected
from gateway.jobs.http_response import read_ahead
from gateway.metrics import GatewayMetrics
from gateway.responses.event_stream import ResponseEventStream
from gateway.responses.from_chat import ResponseEvent
from gateway.responses.repository import CreatedResponse
from gateway.responses.service import PATH, ResponseService
from schemas.endpoints import SSE
from schemas.errors import ErrorInfo, InternalError

log = structlog.get_logger(__name__)

CLIENT_CLOSED_STATUS = 499
"""In logs and metrics: the caller hung up."""
KEEP_ALIVE = b": keep-alive\n\n"
EVENT_OVERHEAD_BYTES = 256
"""Bytes of an event besides its text."""
PREAMBLE_EVENTS = frozenset({"response.created", "response.queued", "response.in_progress"})
"""Events that say nothing of the answer."""


class StreamStart(Enum):
    """When a stream begins: until then, an error is an HTTP status."""

    IMMEDIATELY = "at once"
    """The caller needs the id."""
    ON_STORED_EVENTS = "known"
    """Once it is clear that the events are there."""
    ON_OUTPUT = "answered"
    """Once there is something of the answer."""


class RequestReport:
    """The log line and the count of one request."""

    def __init__(self, metrics: GatewayMetrics, request_id: str) -> None:
        self._metrics = metrics
        self._request_id = request_id
        self._began = monotonic()
        self.created: CreatedResponse | None = None

    def close(self, status: int, error: ErrorInfo | None = None) -> None:
        """It has been answered."""
        created, metrics = self.created, self._metrics
        # A name that nobody serves is the caller's invention: as a label it would grow without bound.
        model = str(created.initial["model"]) if created is not None else ""
        metrics.child(metrics.requests, PATH, model, status).inc()
        fields: dict[str, Any] = {"error": error.code or error.type} if error is not None else {}
        if created is not None:
            fields |= {"job": created.job, "model": model}
        log.info(
            "request.finished",
            request_id=self._request_id,
            endpoint=PATH,
            status=status,
            seconds=round(monotonic() - self._began, 4),
            **fields,
        )


class ResponseStreamReply(Response):
    """A response's events, each sent as it comes. There is no `[DONE]`: the last event says that it is the last."""

    def __init__(
        self,
        responses: ResponseService,
        created: CreatedResponse,
        start: StreamStart,
        keep_alive_s: float,
        report: RequestReport | None,
        after: int = -1,
    ) -> None:
        self._responses = responses
        self._made = created
        self._start = start
        self._keep_alive_s = keep_alive_s
        self._report = report
        self._after = after
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Never raises, but for cancellation."""
        reply = Reply(send, request_id_of(scope))
        reply.headers.append((b"x-nexus-job-id", self._made.job.encode()))
        sender = _EventSender(reply, self._responses.event_stream(self._made, self._after), self._start)
        status, error = CLIENT_CLOSED_STATUS, None
        try:
            error = await self._responses.open.run_while_connected(
                self._send_events(sender, scope.get(EXCHANGE)), scope, receive
            )
            status = reply.status
        except (CallerDisconnected, OSError):
            await self._abandon(stored=True)
        except Exception as failure:
            error = to_error_info(failure, reply.request_id)
        if error is not None and not sender.ended:
            with suppress(OSError):
                await sender.break_off(error)
            status = reply.status
        if sender.event_stream.interrupted or error is not None:
            await self._abandon(stored=reply.status != 200)  # who was answered with an error asks again
        if self._report is not None:
            self._report.close(status, error)

    async def _send_events(self, sender: _EventSender, exchange: HttpExchange | None) -> ErrorInfo | None:
        """Returns the error that it ended in."""
        hold = exchange.report_buffered if exchange is not None else lambda _size: None
        async with aclosing(read_ahead(sender.event_stream.events(), self._keep_alive_s, _size, hold)) as paced:
            async for ready in paced:
                if not ready:
                    await sender.keep_alive()
                elif await sender.take(ready):
                    return sender.event_stream.error
        await sender.end()
        return sender.event_stream.error

    async def _abandon(self, *, stored: bool) -> None:
        """Its caller hears no more of it. End what would be for nobody; with `stored`, also what could be retrieved."""
        if self._made.bound_to_connection and (stored or self._made.stored is None):
            await self._responses.abandon(self._made)


def _size(events: list[ResponseEvent]) -> int:
    """Bytes, roughly: pieces of text by their length, the few events that repeat all of it as they are sent."""
    return sum(
        len(delta) + EVENT_OVERHEAD_BYTES if isinstance(delta := event.body.get("delta"), str) else len(event.encode())
        for event in events
    )


class _EventSender:
    """What of a stream has been sent."""

    def __init__(self, reply: Reply, event_stream: ResponseEventStream, start: StreamStart) -> None:
        self._reply = reply
        self.event_stream = event_stream
        self._start = start
        self._batch_count = 0
        self.ended = False
        """The caller has been told the end."""
        self._unsent: list[ResponseEvent] = []

    async def take(self, ready: list[list[ResponseEvent]]) -> bool:
        """Send what has come, if it is time. True: the caller was answered with an error instead."""
        self._unsent += [event for events in ready for event in events]
        self._batch_count += len(ready)
        if self._failed_before_start():
            self.ended = True
            await self._reply.send_error(self.event_stream.error or InternalError().info)
            return True
        answered = any(event.kind not in PREAMBLE_EVENTS for event in self._unsent)
        known = self._start is StreamStart.ON_STORED_EVENTS and self._batch_count > 1
        if self._reply.started or answered or known or self._start is StreamStart.IMMEDIATELY:
            await self._flush()
        return False

    def _failed_before_start(self) -> bool:
        if self._reply.started or self._start is not StreamStart.ON_OUTPUT or self.event_stream.error is None:
            return False
        last = self._unsent[-1] if self._unsent else None
        return last is not None and last.kind == "response.failed" and last.body["response"]["status"] == "failed"

    async def keep_alive(self) -> None:
        """Nothing has come for a while."""
        await self._flush()
        await self._reply.send_chunk(KEEP_ALIVE)

    async def end(self) -> None:
        """That was all."""
        self.ended = True
        await self._flush()
        await self._reply.send_end()

    async def break_off(self, info: ErrorInfo) -> None:
        """There will be no more, though there should be."""
        if not self._reply.started:
            self.ended = True
            await self._reply.send_error(info)
            return
        self._unsent.append(self.event_stream.interruption_event(info))
        await self.end()

    async def _flush(self) -> None:
        if not self._reply.started:
            adapted = adapted_header(self.event_stream.adapted)
            await self._reply.send_head(200, [(b"content-type", SSE), *STREAM_HEADERS, *adapted])
        data = b"".join(event.encode() for event in self._unsent)
        self._unsent.clear()
        if data:
            await self._reply.send_chunk(data)
