"""The protocols of a tracer and its spans. Times are those of `time.monotonic`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Protocol

from schemas.traces import TraceContext

Attributes = Mapping[str, str | bool | int | float | list[str]]
NO_ATTRIBUTES: Attributes = {}


class SpanKind(Enum):
    """What a span is to its neighbors, as OpenTelemetry defines it."""

    SERVER = auto()
    CLIENT = auto()
    PRODUCER = auto()
    CONSUMER = auto()
    INTERNAL = auto()


class Span(Protocol):
    """One step of a trace. No method blocks or raises."""

    @property
    def context(self) -> TraceContext:
        """The position of the span, for those that continue the trace."""

    @property
    def is_recorded(self) -> bool:
        """Whether the span will be exported: the sampler decides it at the start."""

    def add_event(self, name: str, at: float) -> None:
        """Note a moment within the span."""

    def set_attributes(self, attributes: Attributes) -> None:
        """Add attributes, or replace those of the same names."""

    def end(self, at: float, *, error: str = "") -> None:
        """End the span. `error`: the code of the error that it ended with."""


class Tracer(Protocol):
    """Makes the spans of one process. It exports them in the background, and drops those that the collector does not take in time."""

    def start(
        self,
        name: str,
        kind: SpanKind,
        parent: TraceContext | None = None,
        *,
        at: float | None = None,
        attributes: Attributes = NO_ATTRIBUTES,
    ) -> Span:
        """Begin a span below `parent`, or with a new trace. `at`: None for now."""

    async def close(self) -> None:
        """Export what is left, for a few seconds at most."""


def record_span(
    tracer: Tracer,
    name: str,
    kind: SpanKind,
    parent: TraceContext,
    *,
    start: float,
    end: float,
    attributes: Attributes = NO_ATTRIBUTES,
    error: str = "",
) -> None:
    """Record a span that has ended."""
    tracer.start(name, kind, parent, at=start, attributes=attributes).end(max(start, end), error=error)
