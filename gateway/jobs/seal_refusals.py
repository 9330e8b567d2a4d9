"""Counts messages with invalid seals, and logs them at a limited rate."""

from __future__ import annotations

import time

import structlog

from gateway.metrics import GatewayMetrics

log = structlog.get_logger(__name__)

LOG_INTERVAL_S = 60.0
"""The minimum time between two log lines about messages of one kind."""


class SealRefusalCounter:
    """Counts and logs the messages that this gateway rejected because of an invalid seal."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._logged_at: dict[str, float] = {}

    def count(self, kind: str, job: str) -> None:
        """Count one rejected message. Implements `backbone.bus.sealed_job_log.OnRefused`."""
        self._metrics.child(self._metrics.forgeries, kind).inc()
        now = time.monotonic()
        if now - self._logged_at.get(kind, -LOG_INTERVAL_S) >= LOG_INTERVAL_S:
            self._logged_at[kind] = now
            log.warning("seals.forgery_refused", kind=kind, job=job[:100])
