"""Prometheus's text format, made so that scrapes do not hold up requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import cast

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from gateway.cached_result import CachedResult

MAX_AGE_S = 1.0
"""Scrapes within a second of each other get the same text."""


class _Family:
    """A registry of one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


class MetricsExposition:
    """The metrics of one process as text."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, registry: CollectorRegistry, max_age_s: float = MAX_AGE_S) -> None:
        self._registry = registry
        self._text = CachedResult(self._make, max_age_s)

    async def text(self) -> bytes:
        """The metrics as they are, or were at most a second ago."""
        return await self._text.get()

    async def _make(self) -> bytes:
        """Metric by metric: streams have their turn in between."""
        parts = []
        for metric in self._registry.collect():
            parts.append(generate_latest(cast("CollectorRegistry", _Family(metric))))
            await asyncio.sleep(0)
        return b"".join(parts)
