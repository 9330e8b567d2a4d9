"""Render metrics in Prometheus's text format without blocking requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import cast

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from gateway.cached_result import CachedResult

MAX_AGE_S = 1.0
"""Age up to which scrapes get the same text."""


class _SingleMetricRegistry:
    """Presents one metric as a registry."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


class MetricsExposition:
    """Renders the metrics of one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, registry: CollectorRegistry, max_age_s: float = MAX_AGE_S) -> None:
        self._registry = registry
        self._text = CachedResult(self._render, max_age_s)

    async def text(self) -> bytes:
        """Return the metrics, at most `max_age_s` old."""
        return await self._text.get()

    async def _render(self) -> bytes:
        """Render metric by metric, so that streams get their turn in between."""
        parts = []
        for metric in self._registry.collect():
            parts.append(generate_latest(cast("CollectorRegistry", _SingleMetricRegistry(metric))))
            await asyncio.sleep(0)
        return b"".join(parts)
