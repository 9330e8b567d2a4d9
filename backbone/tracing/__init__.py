"""Traces of requests over processes, in W3C's and OpenTelemetry's terms.

`spans` is what gateways and workers know; `otel` implements it with OpenTelemetry's SDK, and is imported only where `TRACING` is on.
"""
