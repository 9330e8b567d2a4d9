"""Sends a response's events to a caller, and cancels the response if its caller disconnects."""

from __future__ import annotations

from contextlib import aclosing, suppress
from enum import Enum
from time import monotonic
from typing import Any

import structlog
from fastapi.responses import Response

from gateway.http.asgi import EXCHANGE, HttpExchange, Receive, Reply, Scope, Send, to_error_info
from gateway.http.request_body import CallerDisconnected
from gateway.http.stream_writer import StreamWriter
from gateway.jobs.read_ahead import read_ahead
from gateway.metrics import GatewayMetrics
from gateway.responses.event_stream import ResponseEventStream
from gateway.responses.from_chat import ResponseEvent
from gateway.responses.repository import CreatedResponse
from gateway.responses.service import PATH, ResponseService
from schemas.endpoints import SSE
from schemas.errors import ErrorInfo, InternalError

log = structlog.get_logger(__name__)

CLIENT_CLOSED_STATUS = 499
"""The status in logs and metrics if the caller disconnected."""
KEEP_ALIVE = b": keep-alive\n\n"
EVENT_OVERHEAD_BYTES = 256
"""The approximate size of an event without its text."""
PREAMBLE_EVENTS = frozenset({"response.created", "response.queued", "response.in_progress"})
"""The types of events that precede any output."""


class StreamStart(Enum):
    """When a stream starts. An error before the start becomes an HTTP status."""

    IMMEDIATELY = "at once"
    """Immediately, because the caller needs the response's id."""
    ON_STORED_EVENTS = "known"
    """Once the stored events are read."""
    ON_OUTPUT = "answered"
    """Once there is output."""


class RequestReport:
    """Logs and counts one request."""

    def __init__(self, metrics: GatewayMetrics, request_id: str, caller: dict[str, Any]) -> None:
        """`caller`: who sent the request, as `caller_fields` returns it."""
        self._caller = caller
        self._metrics = metrics
        self._request_id = request_id
        self._began = monotonic()
        self.created: CreatedResponse | None = None

    def close(self, status: int, error: ErrorInfo | None = None) -> None:
        """Log and count the finished request."""
        created, metrics = self.created, self._metrics
        # Unknown model names would make the metric's label grow without bound.
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
            **self._caller,
            **fields,
        )


class ResponseStreamReply(Response):
    """Sends a response's events as they arrive. There is no `[DONE]`: the last event's type marks the end."""

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
        self._created = created
        self._start = start
        self._keep_alive_s = keep_alive_s
        self._report = report
        self._after = after
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. Raises nothing but CancelledError."""
        reply = Reply.to(scope, send)
        reply.headers.append((b"x-nexus-job-id", self._created.job.encode()))
        sender = _EventSender(reply, self._responses.event_stream(self._created, self._after), self._start)
        status, error = CLIENT_CLOSED_STATUS, None
        try:
            error = await self._responses.caller_tasks.run_while_connected(
                self._send_events(sender, scope.get(EXCHANGE)), scope, receive
            )
            status = reply.status
            await self._responses.confirm_delivery(self._created)
        except (CallerDisconnected, OSError):
            await self._abandon(stored=True)
        except Exception as failure:
            error = to_error_info(failure, reply.request_id)
        if error is not None and not sender.ended:
            with suppress(OSError):
                await sender.break_off(error)
            status = reply.status
        if sender.event_stream.interrupted or error is not None:
            await self._abandon(stored=reply.status != 200)  # a caller that received an error sends the request again
        if self._report is not None:
            self._report.close(status, error)

    async def _send_events(self, sender: _EventSender, exchange: HttpExchange | None) -> ErrorInfo | None:
        """Send events until the end, and return the response's error."""
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
        """Cancel the response if it is bound to this connection. With `stored`, cancel it even if it can be retrieved."""
        if self._created.bound_to_connection and (stored or self._created.stored is None):
            await self._responses.abandon(self._created)


def _size(events: list[ResponseEvent]) -> int:
    """Return the approximate size of events in bytes."""
    return sum(
        len(delta) + EVENT_OVERHEAD_BYTES if isinstance(delta := event.body.get("delta"), str) else len(event.encode())
        for event in events
    )


class _EventSender:
    """Sends the events of one stream, once its start condition is met."""

    def __init__(self, reply: Reply, event_stream: ResponseEventStream, start: StreamStart) -> None:
        self._reply = reply
        self._writer = StreamWriter(reply, SSE)
        self.event_stream = event_stream
        self._start = start
        self._batch_count = 0
        self.ended = False
        """Whether the end has been sent."""
        self._unsent: list[ResponseEvent] = []

    async def take(self, ready: list[list[ResponseEvent]]) -> bool:
        """Send the events if the stream may start. Return True if an error was sent instead."""
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
        """Send a comment that keeps the connection alive."""
        await self._flush()
        await self._writer.comment(KEEP_ALIVE)

    async def end(self) -> None:
        """Send the end of the stream."""
        self.ended = True
        await self._flush()
        await self._writer.end()

    async def break_off(self, info: ErrorInfo) -> None:
        """Send an error in place of the remaining events."""
        self.ended, last_event = True, b""
        if self._reply.started:
            await self._flush()
            last_event = self.event_stream.interruption_event(info).encode()
        await self._writer.abort(info, last_event)

    async def _flush(self) -> None:
        if not self._reply.started:
            await self._writer.adapt(self.event_stream.adapted)
            await self._writer.begin()
        data = b"".join(event.encode() for event in self._unsent)
        self._unsent.clear()
        await self._writer.write(data)
