"""Check whether the gateway can work: one round trip to each component, and a write to those that store data."""

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
"""A process that was stalled for this long during a round trip repeats it before it reports the server as unavailable."""
WRITE_CHECKED = ("nats", "redis")
"""Components that must also store a write, if they answer."""
TIMEOUT_S = 2.5


class ComponentHealth(BaseModel):
    """Health of one component that the gateway depends on."""

    ok: bool
    ms: float | None = None
    """Round trip, in milliseconds."""
    error: str | None = None


class Readiness(BaseModel):
    """Health of the gateway. `status` is one of:

    - `ready`;
    - `degraded`: synchronous requests work, something else does not;
    - `unavailable`: no request works;
    - `leaving`: requests work, and the gateway shuts down soon.
    """

    status: str
    parts: dict[str, ComponentHealth]

    @property
    def ok(self) -> bool:
        """Whether load balancers should send requests here."""
        return self.status in {"ready", "degraded"}


class ReadinessCheck:
    """Checks every component concurrently; each check ends within `TIMEOUT_S`, or twice that after a stall."""

    def __init__(
        self,
        bus: GatewayBus,
        registry: Registry,
        store: Store,
        shutdown_state: ShutdownState,
        storing: StorageHealth | None = None,
        clock: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`clock` raises Unavailable if this host's clock is off."""
        self._shutdown_state = shutdown_state
        self._storing = storing or StorageHealth()
        self._stalls = StallMonitor()
        self._registry = registry
        self._pings: dict[str, Callable[[], Awaitable[None]]] = {
            "nats": bus.ping,
            "nats_write": self._require_nats_write,
            "etcd": registry.ping,
            "redis": store.ping,
            "redis_write": store.check_write,
        }
        if clock is not None:
            self._pings["clock"] = clock

    async def check(self) -> Readiness:
        """Check all components. Never raises."""
        if self._shutdown_state.begun:
            return Readiness(status="leaving", parts={})
        answers = await asyncio.gather(*(self._check_component(ping) for ping in self._pings.values()))
        parts = dict(zip(self._pings, answers, strict=True))
        for name in WRITE_CHECKED:
            if not parts[name].ok:
                del parts[f"{name}_write"]  # one failure is reported once
        snapshot = self._registry.snapshot is not None
        parts["registry"] = ComponentHealth(
            ok=snapshot, error=None if snapshot else "the registry has not been read yet"
        )
        if not (parts["nats"].ok and parts["nats_write"].ok and snapshot):
            return Readiness(status="unavailable", parts=parts)
        all_ok = all(part.ok for part in parts.values())
        return Readiness(status="ready" if all_ok else "degraded", parts=parts)

    async def _require_nats_write(self) -> None:
        """Raise Unavailable if the last periodic write to NATS failed."""
        self._storing.require_available()

    async def _check_component(self, ping: Callable[[], Awaitable[None]]) -> ComponentHealth:
        """Check a component; repeat a failed check if this process itself was stalled meanwhile."""
        lost_s = self._stalls.stalled_s
        part = await self._check_once(ping)
        if not part.ok and self._stalls.stalled_s - lost_s > STALL_S:
            part = await self._check_once(ping)
        return part

    async def _check_once(self, ping: Callable[[], Awaitable[None]]) -> ComponentHealth:
        began = monotonic()
        try:
            async with self._stalls.timeout(TIMEOUT_S):
                await ping()
        except NexusError as error:
            return ComponentHealth(ok=False, error=error.info.message)
        except TimeoutError:
            return ComponentHealth(ok=False, error=f"no answer within {TIMEOUT_S:g} s")
        return ComponentHealth(ok=True, ms=round((monotonic() - began) * 1000, 2))


class ShutdownState:
    """Whether the gateway's shutdown has begun: `/readyz` reports it, and connections close after their answer."""

    def __init__(self) -> None:
        self.begun = False

    def begin(self) -> None:
        """Begin the shutdown. Idempotent."""
        self.begun = True
