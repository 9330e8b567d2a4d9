"""Make the tracer of a process, where tracing is on."""

from __future__ import annotations

from backbone.secret_files import ConfigurationError
from backbone.settings import CommonSettings
from backbone.tracing.spans import Tracer


def make_tracer(settings: CommonSettings, service: str, instance: str) -> Tracer | None:
    """Return the tracer; None where tracing is off. Only then is OpenTelemetry's SDK not imported. Raises ConfigurationError."""
    if not settings.tracing:
        return None
    try:
        from backbone.tracing.otel import OtelTracer
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"TRACING is on, but {error.name} is not installed. Install the extra: pip install 'nexus-inference-gateway[otel]'."
        ) from error
    return OtelTracer(service, instance)
