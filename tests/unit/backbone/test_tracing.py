"""The tracer of a process, and what its settings refuse."""

from __future__ import annotations

import sys
from time import monotonic

import pytest

from backbone.secret_files import ConfigurationError
from backbone.settings import WorkerSettings
from backbone.tracing.setup import make_tracer
from backbone.tracing.spans import SpanKind
from schemas.traces import TraceContext

UNSAMPLED = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", "a=1")
SAMPLED = TraceContext(UNSAMPLED.traceparent[:-1] + "1")
ON = WorkerSettings(tracing=True)


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """OpenTelemetry's variables; without a collector."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    return monkeypatch


def test_it_is_off_by_default() -> None:
    assert make_tracer(WorkerSettings(), "nexus-worker", "w") is None


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_TRACES_EXPORTER", "console"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]
)
def test_a_variable_that_would_export_nothing_is_an_error(variables: pytest.MonkeyPatch, name: str, value: str) -> None:
    variables.setenv(name, value)
    with pytest.raises(ConfigurationError, match=name):
        make_tracer(ON, "nexus-worker", "w")


def test_a_missing_library_is_an_error(variables: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    variables.delitem(sys.modules, "backbone.tracing.otel", raising=False)
    variables.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigurationError, match=r"nexus-inference-gateway\[otel\]"):
        make_tracer(ON, "nexus-worker", "w")


@pytest.mark.parametrize(
    ("sampler", "parent", "recorded"),
    [
        ("", None, True), ("", UNSAMPLED, False), ("", SAMPLED, True), ("always_off", SAMPLED, False),
        ("parentbased_always_off", None, False), ("parentbased_always_off", SAMPLED, True),
    ],
)  # fmt: skip
async def test_sampling_is_opentelemetrys(
    variables: pytest.MonkeyPatch, sampler: str, parent: TraceContext | None, recorded: bool
) -> None:
    """A caller's decision counts unless the sampler says otherwise; what is not recorded is still passed on as such."""
    variables.setenv("OTEL_TRACES_SAMPLER", sampler or "parentbased_always_on")
    tracer = make_tracer(ON, "nexus-worker", "w")
    assert tracer is not None
    span = tracer.start("x", SpanKind.SERVER, parent)
    assert span.is_recorded is recorded
    assert int(span.context.traceparent[-2:], 16) & 1 == recorded
    if parent is not None:
        assert (span.context.trace_id, span.context.tracestate) == (parent.trace_id, parent.tracestate)
        assert span.context.span_id != parent.span_id
    span.end(monotonic(), error="worker_lost")
    await tracer.close()
