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

CLOSED = 499
"""In logs and metrics: the caller hung up."""
KEEP_ALIVE = b": keep-alive\n\n"
EVENT_SIZE = 256
"""Bytes of an event besides its text."""
FIRST = frozenset({"response.created", "response.queued", "response.in_progress"})
"""Events that say nothing of the answer."""


class StreamStart(Enum):
    """When a stream begins: until then, an error is an HTTP status."""

    AT_ONCE = "at once"
    """The caller needs the id."""
    KNOWN = "known"
    """Once it is clear that the events are there."""
    ANSWERED = "answered"
    """Once there is something of the answer."""


class RequestReport:
    """The log line and the count of one request."""

    def __init__(self, metrics: GatewayMetrics, request_id: str) -> None:
        self._metrics = metrics
        self._request_id = request_id
        self._began = monotonic()
        self.made: CreatedResponse | None = None

    def close(self, status: int, error: ErrorInfo | None = None) -> None:
        """It has been answered."""
        made, metrics = self.made, self._metrics
        # A name that nobody serves is the caller's invention: as a label it would grow without bound.
        model = str(made.shell["model"]) if made is not None else ""
        metrics.child(metrics.requests, PATH, model, status).inc()
        fields: dict[str, Any] = {"error": error.code or error.type} if error is not None else {}
        if made is not None:
            fields |= {"job": made.job, "model": model}
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
        made: CreatedResponse,
        opening: StreamStart,
        pause_s: float,
        report: RequestReport | None,
        after: int = -1,
    ) -> None:
        self._responses = responses
        self._made = made
        self._opening = opening
        self._pause_s = pause_s
        self._report = report
        self._after = after
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Never raises, but for cancellation."""
        reply = Reply(send, request_id_of(scope))
        reply.headers.append((b"x-nexus-job-id", self._made.job.encode()))
        sending = _Sending(reply, self._responses.watch(self._made, self._after), self._opening)
        status, error = CLOSED, None
        try:
            error = await self._responses.open.run_while_connected(
                self._relay(sending, scope.get(EXCHANGE)), scope, receive
            )
            status = reply.status
        except (CallerDisconnected, OSError):
            await self._leave(stored=True)
        except Exception as failure:
            error = to_error_info(failure, reply.request_id)
        if error is not None and not sending.over:
            with suppress(OSError):
                await sending.break_off(error)
            status = reply.status
        if sending.watch.broke_off or error is not None:
            await self._leave(stored=reply.status != 200)  # who was answered with an error asks again
        if self._report is not None:
            self._report.close(status, error)

    async def _relay(self, sending: _Sending, exchange: HttpExchange | None) -> ErrorInfo | None:
        """Returns the error that it ended in."""
        hold = exchange.report_buffered if exchange is not None else lambda _size: None
        async with aclosing(read_ahead(sending.watch.events(), self._pause_s, _size, hold)) as paced:
            async for ready in paced:
                if not ready:
                    await sending.keep_alive()
                elif await sending.take(ready):
                    return sending.watch.error
        await sending.end()
        return sending.watch.error

    async def _leave(self, *, stored: bool) -> None:
        """Its caller hears no more of it. End what would be for nobody; with `stored`, also what could be retrieved."""
        if self._made.callers and (stored or self._made.kept is None):
            await self._responses.abandon(self._made)


def _size(events: list[ResponseEvent]) -> int:
    """Bytes, roughly: pieces of text by their length, the few events that repeat all of it as they are sent."""
    return sum(
        len(delta) + EVENT_SIZE if isinstance(delta := event.body.get("delta"), str) else len(event.encode())
        for event in events
    )


class _Sending:
    """What of a stream has been sent."""

    def __init__(self, reply: Reply, watch: ResponseEventStream, opening: StreamStart) -> None:
        self._reply = reply
        self.watch = watch
        self._opening = opening
        self._batches = 0
        self.over = False
        """The caller has been told the end."""
        self._waiting: list[ResponseEvent] = []

    async def take(self, ready: list[list[ResponseEvent]]) -> bool:
        """Send what has come, if it is time. True: the caller was answered with an error instead."""
        self._waiting += [event for events in ready for event in events]
        self._batches += len(ready)
        if self._fails_unseen():
            self.over = True
            await self._reply.send_error(self.watch.error or InternalError().info)
            return True
        answered = any(event.kind not in FIRST for event in self._waiting)
        known = self._opening is StreamStart.KNOWN and self._batches > 1
        if self._reply.started or answered or known or self._opening is StreamStart.AT_ONCE:
            await self._flush()
        return False

    def _fails_unseen(self) -> bool:
        if self._reply.started or self._opening is not StreamStart.ANSWERED or self.watch.error is None:
            return False
        last = self._waiting[-1] if self._waiting else None
        return last is not None and last.kind == "response.failed" and last.body["response"]["status"] == "failed"

    async def keep_alive(self) -> None:
        """Nothing has come for a while."""
        await self._flush()
        await self._reply.send_chunk(KEEP_ALIVE)

    async def end(self) -> None:
        """That was all."""
        self.over = True
        await self._flush()
        await self._reply.send_end()

    async def break_off(self, info: ErrorInfo) -> None:
        """There will be no more, though there should be."""
        if not self._reply.started:
            self.over = True
            await self._reply.send_error(info)
            return
        self._waiting.append(self.watch.broken(info))
        await self.end()

    async def _flush(self) -> None:
        if not self._reply.started:
            adapted = adapted_header(self.watch.adapted)
            await self._reply.send_head(200, [(b"content-type", SSE), *STREAM_HEADERS, *adapted])
        data = b"".join(event.encode() for event in self._waiting)
        self._waiting.clear()
        if data:
            await self._reply.send_chunk(data)
