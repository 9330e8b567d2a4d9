"""The spans of requests and jobs that a gateway records, by OpenTelemetry's conventions for HTTP and generative AI.

Nothing that a caller or a model wrote is in them: no prompt, no answer, no error message.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic
from typing import NamedTuple

from backbone.tracing.spans import Span, SpanKind, Tracer, record_span
from schemas.jobs import Capability, Envelope
from schemas.traces import TraceContext, read_trace_context

OPERATIONS = {
    Capability.CHAT: "chat",
    Capability.COMPLETIONS: "text_completion",
    Capability.EMBEDDINGS: "embeddings",
    Capability.IMAGES: "generate_content",
    Capability.SPEECH: "generate_content",
}
"""Names of `gen_ai.operation.name`; other capabilities have their own."""
SERVER_ERROR = 500


class LostAttempt(NamedTuple):
    """An attempt whose worker fell silent, which therefore records no span of its own."""

    worker: str
    delivery: int
    started_at: float
    lost_at: float


class RequestTimes(NamedTuple):
    """When the parts of a synchronous request ended, in monotonic seconds; None: they did not."""

    submitted_at: float
    started_at: float | None
    first_output_at: float | None


class RequestTrace:
    """What a synchronous request learns for its spans while it waits."""

    __slots__ = ("lost", "stored_at")

    def __init__(self) -> None:
        self.stored_at: float | None = None
        self.lost: list[LostAttempt] = []

    def note_stored(self) -> None:
        """Note that the job is stored."""
        if self.stored_at is None:
            self.stored_at = monotonic()

    def note_lost(self, worker: str, delivery: int, started_at: float | None) -> None:
        """Note that the worker of an attempt fell silent. `started_at`: when the first attempt of the request began."""
        now = monotonic()
        began = self.lost[-1].lost_at if self.lost else started_at or now
        self.lost.append(LostAttempt(worker, delivery, began, now))


def caller_context(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """Return the position in the caller's trace, if its headers hold one that is valid."""
    parent, state = b"", b""
    for name, value in headers:
        if name == b"traceparent":
            parent = value
        elif name == b"tracestate":
            state = value
    return read_trace_context(parent, state) if parent else None


def start_request(
    tracer: Tracer, path: str, request_id: str, owner: str, headers: Iterable[tuple[bytes, bytes]], at: float
) -> Span:
    """Begin the span of a caller's request."""
    attributes = {
        "http.request.method": "POST",
        "http.route": path,
        "url.path": path,
        "nexus.request_id": request_id,
        "nexus.team": owner,
    }
    return tracer.start(f"POST {path}", SpanKind.SERVER, caller_context(headers), at=at, attributes=attributes)


def end_request(span: Span, status: int, ended_at: float, error: str = "") -> None:
    """End the span of a caller's request. By the conventions, only a server's errors are errors of its span."""
    attributes: dict[str, str | int] = {"http.response.status_code": status}
    if error and status < SERVER_ERROR:
        attributes["error.type"] = error
    span.set_attributes(attributes)
    span.end(ended_at, error=error or str(status) if status >= SERVER_ERROR else "")


def model_attributes(capability: Capability, public_model: str, model: str) -> dict[str, str]:
    """Return the attributes of what a model is asked for."""
    return {
        "gen_ai.operation.name": OPERATIONS.get(capability, capability.value),
        "gen_ai.request.model": public_model,
        "nexus.model": model,
    }


def record_waits(
    tracer: Tracer, span: Span, envelope: Envelope, times: RequestTimes, trace: RequestTrace, ended_at: float
) -> None:
    """Record what a synchronous request has waited for, as children of its span."""
    context = span.context
    attributes = {"nexus.job": envelope.job, "messaging.system": "nats"}
    stored_at = trace.stored_at or times.started_at or ended_at
    record_span(
        tracer, "publish", SpanKind.PRODUCER, context, start=times.submitted_at, end=stored_at, attributes=attributes
    )
    started_at = times.started_at or ended_at
    waited = {"nexus.job": envelope.job, "nexus.lane": envelope.lane.value, "nexus.model": envelope.model}
    record_span(
        tracer, "wait in queue", SpanKind.INTERNAL, context, start=times.submitted_at, end=started_at, attributes=waited
    )
    for one in trace.lost:
        record_lost(tracer, context, envelope.job, one)
    if times.first_output_at is not None:
        span.add_event("first_token", times.first_output_at)


def record_lost(tracer: Tracer, parent: TraceContext, job: str, lost: LostAttempt) -> None:
    """Record an attempt in the place of its worker."""
    record_span(
        tracer,
        "attempt",
        SpanKind.CONSUMER,
        parent,
        start=lost.started_at,
        end=lost.lost_at,
        attributes={
            "nexus.job": job,
            "nexus.worker": lost.worker,
            "nexus.delivery": lost.delivery,
            "nexus.attempt.outcome": "lost",
        },
        error="worker_lost",
    )


class JobTraces:
    """The spans of durable jobs."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def start_publish(self, parent: Span | None, owner: str) -> Span:
        """Begin the span in which a job is stored. Without a parent, the job has a trace of its own."""
        context = parent.context if parent is not None else None
        return self._tracer.start(
            "publish", SpanKind.PRODUCER, context, attributes={"messaging.system": "nats", "nexus.team": owner}
        )

    def record_outcome(self, traceparent: str, job: str, status: str, error: str, started: float) -> None:
        """Record that a job's outcome was written into its record. `started`: when this began."""
        parent = read_trace_context(traceparent)
        if parent is not None:
            record_span(
                self._tracer,
                "record outcome",
                SpanKind.INTERNAL,
                parent,
                start=started,
                end=monotonic(),
                attributes={"nexus.job": job, "nexus.job.status": status},
                error=error,
            )

    def record_webhook(
        self,
        traceparent: str,
        job: str,
        host: str,
        attempt: int,
        status: int | None,
        *,
        delivered: bool,
        started: float,
    ) -> None:
        """Record one attempt to deliver a job's webhook."""
        parent = read_trace_context(traceparent)
        if parent is None:
            return
        attributes: dict[str, str | int] = {
            "http.request.method": "POST",
            "server.address": host,
            "nexus.job": job,
            "http.request.resend_count": attempt - 1,
        }
        if status is not None:
            attributes["http.response.status_code"] = status
        error = "" if delivered else str(status or "no_answer")
        record_span(
            self._tracer,
            "POST webhook",
            SpanKind.CLIENT,
            parent,
            start=started,
            end=monotonic(),
            attributes=attributes,
            error=error,
        )

    def record_lost_attempt(self, traceparent: str, job: str, lost: LostAttempt) -> None:
        """Record an attempt whose worker fell silent."""
        parent = read_trace_context(traceparent)
        if parent is not None:
            record_lost(self._tracer, parent, job, lost)
