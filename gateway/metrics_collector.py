"""How a gateway and what it needs are, for its metrics: what alarms are made of."""

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

LOOK_S = 5.0
LAG_S = 0.25


class MetricsCollector:
    """Looks every few seconds, whoever reads the metrics, so that reading them costs nothing."""

    def __init__(self, bus: GatewayBus, registry: Registry, readiness: ReadinessCheck, metrics: GatewayMetrics) -> None:
        self._bus = bus
        self._readiness = readiness
        self._metrics = metrics
        self._tasks: list[asyncio.Task[None]] = []
        metrics.population.snapshot = lambda: registry.snapshot

    async def start(self) -> None:
        """Begin. The parts that are looked at are up."""
        self._tasks = [asyncio.create_task(self._look()), asyncio.create_task(self._feel())]

    async def close(self) -> None:
        """End."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _look(self) -> None:
        while True:
            try:
                for name, part in (await self._readiness.check()).parts.items():
                    self._metrics.child(self._metrics.part_up, name).set(part.ok)
                self._metrics.set_storage(await self._bus.storage_usage())
            except Unavailable as error:
                log.debug("metrics.storage_unknown", error=error.info.message)
            except Exception:
                log.exception("metrics.poll_crashed")
            await asyncio.sleep(LOOK_S)

    async def _feel(self) -> None:
        """A loop that is held up holds up every stream; this wakes up late then."""
        while True:
            due = monotonic() + LAG_S
            await asyncio.sleep(LAG_S)
            self._metrics.loop_lag.observe(max(0.0, monotonic() - due))
