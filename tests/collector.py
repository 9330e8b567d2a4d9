"""A collector of traces: receives OTLP over HTTP, reads it with OpenTelemetry's own classes, and keeps the spans."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.servers import here


class CollectedSpan(NamedTuple):
    """One span as the collector received it."""

    service: str
    instance: str
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    state: str
    start_s: float
    end_s: float
    attributes: dict[str, Any]
    events: dict[str, float]
    """Their times, in Unix seconds."""
    is_error: bool


class Collector:
    """Keeps what was exported. Other requests than exports, such as webhooks, are answered 200 and counted."""

    def __init__(self) -> None:
        self.spans: list[CollectedSpan] = []
        self.others: list[str] = []
        self.received = b""
        """All bytes of all exports."""
        self._server = ThreadingHTTPServer((here(), 0), self._handler())

    @property
    def url(self) -> str:
        """Where exports go; `OTEL_EXPORTER_OTLP_ENDPOINT`."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                answer = collector.take(self.path, body, self.headers.get("content-encoding", ""))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

        return Handler

    def take(self, path: str, body: bytes, coding: str) -> bytes:
        """Keep one export."""
        if path != "/v1/traces":
            self.others.append(path)
            return b""
        data = gzip.decompress(body) if coding == "gzip" else body
        request = ExportTraceServiceRequest.FromString(data)
        self.received += data
        for resource in request.resource_spans:
            about = {one.key: _value(one.value) for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [_span(about, span) for span in scope.spans]
        return ExportTraceServiceResponse().SerializeToString()

    def trace(self, trace_id: str) -> list[CollectedSpan]:
        """The spans of one trace, by their start."""
        return sorted((span for span in self.spans if span.trace == trace_id), key=lambda span: span.start_s)

    def serve(self) -> None:
        """Serve until `close`."""
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        """Stop, and free the port."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that serves."""
    collector = Collector()
    thread = threading.Thread(target=collector.serve)
    thread.start()
    try:
        yield collector
    finally:
        collector.close()
        thread.join()


def _span(about: dict[str, Any], span: SpanMessage) -> CollectedSpan:
    return CollectedSpan(
        about["service.name"],
        about["service.instance.id"],
        span.name,
        SpanMessage.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_state,
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        {one.key: _value(one.value) for one in span.attributes},
        {event.name: event.time_unix_nano / 1e9 for event in span.events},
        span.status.code == Status.STATUS_CODE_ERROR,
    )


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind) if kind else None
