"""Can this gateway do its work? An active round trip to each part, and a write where it stores something."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic

from pydantic import BaseModel

from backbone.bus.bus import GatewayBus
from backbone.bus.nats.write_probe import StorageHealth
from backbone.registry.registry import Registry
from backbone.stalls import StallMonitor
from backbone.store.store import Store
from schemas.errors import NexusError

STALL_S = 0.25
"""A process that stood still for so long during a round trip asks again before it blames a server."""
WRITES = ("nats", "redis")
"""Parts that have to prove a write too, once they answer."""


class ComponentHealth(BaseModel):
    """One dependency."""

    ok: bool
    ms: float | None = None
    """The round trip, in milliseconds."""
    error: str | None = None


class Readiness(BaseModel):
    """`ready`; `degraded`: synchronous requests work, something else does not; `unavailable`: no request works; `leaving`: they
    do, and soon will not.
    """

    status: str
    parts: dict[str, ComponentHealth]

    @property
    def ok(self) -> bool:
        """Whether requests should come here."""
        return self.status in {"ready", "degraded"}


class ReadinessCheck:
    """Asks every part at once; each ends within about two seconds."""

    def __init__(
        self,
        bus: GatewayBus,
        registry: Registry,
        store: Store,
        leaving: ShutdownState,
        storing: StorageHealth | None = None,
        clock: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`clock` raises Unavailable where this host's clock is off."""
        self._shutdown_state = leaving
        self._storing = storing or StorageHealth()
        self._stalls = StallMonitor()
        self._registry = registry
        self._pings: dict[str, Callable[[], Awaitable[None]]] = {
            "nats": bus.ping,
            "nats_write": self._nats_stores,
            "etcd": registry.ping,
            "redis": store.ping,
            "redis_write": store.check_write,
        }
        if clock is not None:
            self._pings["clock"] = clock

    async def check(self) -> Readiness:
        """Never raises."""
        if self._shutdown_state.begun:
            return Readiness(status="leaving", parts={})
        answers = await asyncio.gather(*(self._ask(ping) for ping in self._pings.values()))
        parts = dict(zip(self._pings, answers, strict=True))
        for name in WRITES:
            if not parts[name].ok:
                del parts[f"{name}_write"]  # one trouble, not two
        snapshot = self._registry.snapshot is not None
        parts["registry"] = ComponentHealth(ok=snapshot, error=None if snapshot else "no snapshot of the registry yet")
        if not (parts["nats"].ok and parts["nats_write"].ok and snapshot):
            return Readiness(status="unavailable", parts=parts)
        all_ok = all(part.ok for part in parts.values())
        return Readiness(status="ready" if all_ok else "degraded", parts=parts)

    async def _nats_stores(self) -> None:
        """What the last proof showed: it is repeated every few seconds, whoever asks."""
        self._storing.require_available()

    async def _ask(self, ping: Callable[[], Awaitable[None]]) -> ComponentHealth:
        """Ask once; again where the silence may have been this process's own, which stood still meanwhile."""
        lost_s = self._stalls.stalled_s
        part = await self._ask_once(ping)
        if not part.ok and self._stalls.stalled_s - lost_s > STALL_S:
            part = await self._ask_once(ping)
        return part

    async def _ask_once(self, ping: Callable[[], Awaitable[None]]) -> ComponentHealth:
        began = monotonic()
        try:
            async with self._stalls.timeout(2.5):
                await ping()
        except NexusError as error:
            return ComponentHealth(ok=False, error=error.info.message)
        except TimeoutError:
            return ComponentHealth(ok=False, error="no answer within 2.5 s")
        return ComponentHealth(ok=True, ms=round((monotonic() - began) * 1000, 2))


class ShutdownState:
    """Not yet, or for good. Readiness says so, and connections are not kept for another request."""

    def __init__(self) -> None:
        self.begun = False

    def begin(self) -> None:
        """From now on. Idempotent."""
        self.begun = True
