"""Spans by OpenTelemetry's SDK, exported as OTLP over HTTP.

A thread of the SDK sends spans in batches. Its queue is bounded (`OTEL_BSP_MAX_QUEUE_SIZE`, 2048 spans): while the collector is away,
older spans are dropped, and no request waits. The variables of OpenTelemetry's specification apply, with their defaults.
"""

from __future__ import annotations

import asyncio
import os
import threading
from math import isfinite
from time import monotonic, time_ns
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind as OtelKind
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from backbone.secret_files import ConfigurationError
from backbone.tracing.spans import NO_ATTRIBUTES, Attributes, SpanKind
from backbone.version import VERSION
from schemas.traces import TraceContext

CLOSE_TIMEOUT_S = 3.0
EXPORTERS = ("otlp", "none")
PROTOCOL = "http/protobuf"
_KINDS = {kind: OtelKind[kind.name] for kind in SpanKind}
_PROPAGATOR = TraceContextTextMapPropagator()


def _unix_ns(at: float) -> int:
    ago_s = monotonic() - at
    return time_ns() - int(ago_s * 1e9) if isfinite(ago_s) else time_ns()


class OtelSpan:
    """See `backbone.tracing.spans.Span`."""

    __slots__ = ("_span",)

    def __init__(self, span: Any) -> None:
        self._span = span

    @property
    def context(self) -> TraceContext:
        found = self._span.get_span_context()
        traceparent = f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}"
        return TraceContext(traceparent, found.trace_state.to_header())

    @property
    def is_recorded(self) -> bool:
        return bool(self._span.is_recording())

    def add_event(self, name: str, at: float) -> None:
        self._span.add_event(name, timestamp=_unix_ns(at))

    def set_attributes(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def end(self, at: float, *, error: str = "") -> None:
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(_unix_ns(at))


class OtelTracer:
    """See `backbone.tracing.spans.Tracer`."""

    def __init__(self, service: str, instance: str) -> None:
        """Create a tracer. `service`: the service's name, unless OpenTelemetry's variables set one; `instance`: the process's id.

        Raises ConfigurationError.
        """
        _check_variables()
        own: dict[str, str] = {"service.instance.id": instance, "service.version": VERSION}
        if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            own["service.name"] = service
        try:
            self._provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
            if os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp":
                self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        except ValueError as error:
            raise ConfigurationError(f"OpenTelemetry's settings (OTEL_…) cannot be used: {error}") from error
        self._tracer = self._provider.get_tracer("nexus", VERSION)

    def start(
        self,
        name: str,
        kind: SpanKind,
        parent: TraceContext | None = None,
        *,
        at: float | None = None,
        attributes: Attributes = NO_ATTRIBUTES,
    ) -> OtelSpan:
        context = Context()
        if parent is not None:
            context = _PROPAGATOR.extract({"traceparent": parent.traceparent, "tracestate": parent.tracestate}, context)
        started = _unix_ns(monotonic() if at is None else at)
        return OtelSpan(
            self._tracer.start_span(name, context, kind=_KINDS[kind], attributes=attributes, start_time=started)
        )

    async def close(self) -> None:
        # The SDK waits up to 30 s for a collector that does not answer; its threads die with the process.
        closing = threading.Thread(target=self._provider.shutdown, name="tracer-shutdown", daemon=True)
        closing.start()
        until = monotonic() + CLOSE_TIMEOUT_S
        while closing.is_alive() and monotonic() < until:
            await asyncio.sleep(0.02)


def _check_variables() -> None:
    """Raise ConfigurationError for values that would silently export nothing."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if exporter not in EXPORTERS:
        raise ConfigurationError(f"OTEL_TRACES_EXPORTER is '{exporter}'. Set it to otlp or none, or leave it out.")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if os.environ.get(name, PROTOCOL) != PROTOCOL:
            raise ConfigurationError(f"{name} is '{os.environ[name]}'. Nexus exports over {PROTOCOL} only.")
