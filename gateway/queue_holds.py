"""Hold the queues of models: their waiting jobs stay, whichever worker asks, until an operator releases them.

The registry stores which models are held, and every gateway sees it; NATS enforces it (`GatewayBus.apply_holds`). The gateway that is asked
does both before it answers. The others repeat it: the asked one may die in between, and NATS may lose its data.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping

import structlog

from backbone.bus.bus import GatewayBus
from backbone.registry.registry import Registry
from gateway.clock import now
from schemas.errors import NexusError
from schemas.presence import ModelHold, RegistrySnapshot

log = structlog.get_logger(__name__)

REPEAT_INTERVAL_S = 30.0
RETRY_DELAY_S = 1.0


class QueueHolds:
    """Sets holds, and keeps NATS in agreement with the registry."""

    def __init__(self, bus: GatewayBus, registry: Registry) -> None:
        self._bus = bus
        self._registry = registry
        self._applied: Mapping[str, ModelHold] | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._unsubscribe: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Follow the registry. Bus and registry have started."""
        self._unsubscribe = self._registry.subscribe(self._on_snapshot)
        self._task = asyncio.create_task(self._apply_forever())

    async def close(self) -> None:
        """Stop. Held queues stay held."""
        self._unsubscribe()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def get(self, model: str) -> ModelHold | None:
        """Return the hold of a model; None: its jobs are not held."""
        snapshot = self._registry.snapshot
        return snapshot.holds.get(model) if snapshot is not None else None

    async def hold(self, model: str, reason: str) -> ModelHold:
        """Hold the model's queues; the jobs that run go on. A second hold replaces the reason. Raises Unavailable."""
        before = self.get(model)
        hold = ModelHold(model=model, since=before.since if before is not None else int(now()), reason=reason)
        await self._registry.put_hold(hold)
        await self._apply()
        return hold

    async def release(self, model: str) -> bool:
        """Release the model's queues; False: they were not held. Raises Unavailable."""
        was_held = await self._registry.remove_hold(model)
        await self._apply()
        return was_held

    def _on_snapshot(self, snapshot: RegistrySnapshot) -> None:
        if snapshot.holds != self._applied:
            self._changed.set()

    async def _apply(self) -> None:
        """Bring NATS into agreement with the registry. Raises Unavailable."""
        snapshot = self._registry.snapshot
        if snapshot is not None:
            self._changed.clear()
            await self._bus.apply_holds(snapshot.holds.__contains__)
            self._applied = snapshot.holds

    async def _apply_forever(self) -> None:
        wait_s = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            wait_s = REPEAT_INTERVAL_S
            try:
                await self._apply()
            except NexusError as error:
                log.debug("holds.not_applied", error=error.info.message)
                await asyncio.sleep(RETRY_DELAY_S)
                wait_s = 0.0
            except Exception:
                log.exception("holds.apply_crashed")
