"""Poll the health of the gateway's parts, the size of NATS's streams and the event loop's lag into metrics."""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic

import structlog

from backbone.bus.bus import GatewayBus
from backbone.registry.registry import Registry
from gateway.health import ReadinessCheck
from gateway.metrics import GatewayMetrics
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

POLL_INTERVAL_S = 5.0
LAG_INTERVAL_S = 0.25


class MetricsCollector:
    """Polls every few seconds, independent of scrapes, so that a scrape costs nothing."""

    def __init__(self, bus: GatewayBus, registry: Registry, readiness: ReadinessCheck, metrics: GatewayMetrics) -> None:
        self._bus = bus
        self._readiness = readiness
        self._metrics = metrics
        self._tasks: list[asyncio.Task[None]] = []
        metrics.workers.snapshot = lambda: registry.snapshot

    async def start(self) -> None:
        """Start to poll. The polled parts have started."""
        self._tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._observe_loop_lag())]

    async def close(self) -> None:
        """Stop to poll."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _poll(self) -> None:
        while True:
            try:
                for name, part in (await self._readiness.check()).parts.items():
                    self._metrics.child(self._metrics.part_up, name).set(part.ok)
                self._metrics.set_storage(await self._bus.storage_usage())
            except Unavailable as error:
                log.debug("metrics.storage_unknown", error=error.info.message)
            except Exception:
                log.exception("metrics.poll_crashed")
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _observe_loop_lag(self) -> None:
        """Observe how late the event loop wakes this task: that late is every stream."""
        while True:
            due = monotonic() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self._metrics.loop_lag.observe(max(0.0, monotonic() - due))
