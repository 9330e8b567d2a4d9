"""The spans of one attempt: the attempt itself, and the call of the inference server in it, with its first token.

Nothing that a caller or a model wrote is in them: no prompt, no answer, no error message.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from math import isfinite
from time import monotonic, time
from typing import cast

from backbone.bus.bus import JobDelivery
from backbone.tracing.spans import Span, SpanKind, Tracer, record_span
from schemas.errors import NexusError
from schemas.jobs import Capability, Envelope, Usage
from schemas.traces import TraceContext
from workers.adapter_kit.http_client import TRACE_HEADERS
from workers.backends.base import Backend, Chunk, Finish, Output, Task

OPERATIONS = {
    Capability.CHAT: "chat",
    Capability.COMPLETIONS: "text_completion",
    Capability.IMAGES: "generate_content",
    Capability.SPEECH: "generate_content",
}
"""Names of `gen_ai.operation.name`; other capabilities have their own."""
FINISH_REASON = re.compile(rb'"finish_reason"\s*:\s*"([a-z_]{1,40})"')
FINISH_BYTES = 4096
"""Bytes at the end of a piece of output in which a finish reason is looked for."""
JOB_TIME = re.compile(r"job_([0-9a-f]{12})7")
"""The Unix milliseconds at which the id of a job was made (UUIDv7)."""
QUIET_OUTCOMES = frozenset({"completed", "cancelled"})
"""Outcomes of attempts that did not fail."""


class AttemptTrace:
    """The spans of one attempt. `Attempt` calls it where tracing is on and the job has a trace."""

    def __init__(self, tracer: Tracer, parent: TraceContext, envelope: Envelope, job: JobDelivery, worker: str) -> None:
        """Begin the attempt's span. The time that a durable job has waited becomes a span too: its gateway may be another one by now."""
        self._tracer = tracer
        self._envelope = envelope
        now = monotonic()
        if envelope.durable and job.delivery == 1:
            record_span(
                tracer, "wait in queue", SpanKind.INTERNAL, parent, start=now - _waited_s(job, envelope.job), end=now,
                attributes={"nexus.job": envelope.job, "nexus.lane": envelope.lane.value, "nexus.model": envelope.model},
            )  # fmt: skip
        attributes: dict[str, str | int] = {
            "nexus.job": envelope.job,
            "nexus.run": envelope.run,
            "nexus.delivery": job.delivery,
            "nexus.worker": worker,
            "nexus.team": envelope.owner,
            "messaging.system": "nats",
        }
        self._span = tracer.start("attempt", SpanKind.CONSUMER, parent, at=now, attributes=attributes)
        self._first_token_at: float | None = None
        self._finish_reason = ""
        self._usage: Usage | None = None

    @property
    def trace_id(self) -> str:
        """The id of the job's trace."""
        return self._span.context.trace_id

    async def run(self, backend: Backend, task: Task) -> AsyncGenerator[Output, None]:
        """Yield what the backend yields for the task, and record the call. The backend's server receives the trace."""
        env = self._envelope
        operation = OPERATIONS.get(env.capability, env.capability.value)
        attributes: dict[str, str | bool] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": backend.name,
            "gen_ai.request.model": env.model,
            "gen_ai.request.stream": env.stream,
        }
        span = self._tracer.start(
            f"{operation} {env.model}", SpanKind.CLIENT, self._span.context, attributes=attributes
        )
        TRACE_HEADERS.set(_header_lines(span.context))
        error = "abandoned"
        try:
            output = cast("AsyncGenerator[Output, None]", backend.run(self._watched(task)))
            async with aclosing(output):
                async for piece in output:
                    if isinstance(piece, Chunk):
                        self._note_output(piece.data)
                    elif isinstance(piece, Finish):
                        self._usage, error = piece.usage, ""
                    yield piece
        except NexusError as failed:
            error = failed.info.code or failed.info.type
            raise
        finally:
            self._end_call(span, error)

    def _watched(self, task: Task) -> Task:
        push = task.push
        if push is None:
            return task

        def note_and_push(data: bytes, tokens: int) -> None:
            self._note_output(data)
            push(data, tokens)

        return replace(task, push=note_and_push)

    def _note_output(self, data: bytes) -> None:
        if self._first_token_at is None:
            self._first_token_at = monotonic()
        if b"finish_reason" in data and (found := FINISH_REASON.findall(data[-FINISH_BYTES:])):
            self._finish_reason = found[-1].decode()

    def _end_call(self, span: Span, error: str) -> None:
        attributes: dict[str, str | int | list[str]] = {"gen_ai.response.model": self._envelope.model}
        if self._usage is not None:
            attributes["gen_ai.usage.input_tokens"] = self._usage.prompt_tokens
            attributes["gen_ai.usage.output_tokens"] = self._usage.completion_tokens
        if self._finish_reason:
            attributes["gen_ai.response.finish_reasons"] = [self._finish_reason]
        if self._first_token_at is not None:
            span.add_event("first_token", self._first_token_at)
        span.set_attributes(attributes)
        span.end(monotonic(), error=error)

    def end(self, ended_at: float, outcome: str, stop_reason: str, error: str) -> None:
        """End the attempt's span. `outcome`: `Attempt.outcome`; `stop_reason`: why it was stopped from outside; `error`: the code of its error."""
        attributes = {"nexus.attempt.outcome": outcome}
        if stop_reason:
            attributes["nexus.attempt.stop_reason"] = stop_reason
        self._span.set_attributes(attributes)
        failed = error or (stop_reason or outcome if outcome not in QUIET_OUTCOMES else "")
        self._span.end(ended_at, error=failed)


def _waited_s(job: JobDelivery, job_id: str) -> float:
    """Return how long the job has waited; by the clocks of two hosts, before this one has learned the time of NATS."""
    if isfinite(job.age_s):
        return job.age_s
    made = JOB_TIME.match(job_id)
    return max(0.0, time() - int(made[1], 16) / 1000) if made is not None else 0.0


def _header_lines(context: TraceContext) -> str:
    """Return the headers that continue the trace, as lines of an HTTP request."""
    lines = f"traceparent: {context.traceparent}\r\n"
    return lines + f"tracestate: {context.tracestate}\r\n" if context.tracestate else lines
