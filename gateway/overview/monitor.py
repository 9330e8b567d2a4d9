"""Compute the overview once a second for all who follow it, and only while somebody does."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import orjson
import structlog

from backbone.bus.bus import GatewayBus, Queue, QueueDepth, StorageUsage
from backbone.clock import now
from backbone.store.store import Store
from gateway.dispatcher import Dispatcher
from gateway.health import Readiness
from gateway.model_catalog import MANAGEMENT
from gateway.overview.attention import Item, attention
from gateway.overview.rows import OverviewInputs, Row, make_rows
from gateway.overview.traffic import TrafficExchange
from schemas.errors import NexusError, Unavailable
from schemas.jobs import Capability
from schemas.presence import RegistrySnapshot

log = structlog.get_logger(__name__)

INTERVAL_S = 1.0
READ_TIMEOUT_S = 1.5
"""A server that does not answer within this time is away: the frame is sent without its news."""
SLOW_INTERVAL_S = 5.0
"""Between readings of the sizes of streams and of the numbers of dead letters."""
HEALTH_INTERVAL_S = 2.0
MAX_OLDEST_READ = 64
"""Queues of which one computation looks up the oldest job. Beyond it, they take turns."""
MAX_SERVICE_TIMES_READ = 20
MAX_AGE_S = 1.2
LINGER_S = 5.0
"""The computation goes on for this time after the last follower, who may be about to come back."""

Frame = dict[str, Any]


@dataclass(frozen=True, slots=True)
class OverviewSources:
    """The parts that the overview reads."""

    bus: GatewayBus
    dispatcher: Dispatcher
    store: Store
    traffic: TrafficExchange
    check_readiness: Callable[[], Awaitable[Readiness]]
    ledger_lag_s: Callable[[], float] = lambda: 0.0
    """How late events reach the ledger, in seconds; 0: not at all, or there is none."""


@dataclass(slots=True)
class _Published:
    """The overview at one moment, and as much of it as has been encoded."""

    number: int = 0
    at: float = 0.0
    made_at: float = -math.inf
    """In monotonic seconds."""
    stale_since: float | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    attention: list[Item] = field(default_factory=list)
    gateways: int = 1
    whole: bytes | None = None
    changes: bytes = b""

    @property
    def is_fresh(self) -> bool:
        """Whether it is about a second old at most."""
        return monotonic() - self.made_at <= MAX_AGE_S

    def head(self) -> Frame:
        """Return the fields that every frame has."""
        return {
            "object": "overview",
            "at": round(self.at, 3),
            "stale_since": self.stale_since,
            "gateways": self.gateways,
        }

    def frame(self) -> Frame:
        """Return the whole overview."""
        return self.head() | {"attention": self.attention, "models": list(self.rows.values())}

    def event(self) -> bytes:
        """Return the whole overview as an event, encoded once."""
        if self.whole is None:
            self.whole = b"event: overview\ndata: %b\n\n" % orjson.dumps(self.frame())
        return self.whole


class OverviewMonitor:
    """Owns the computation, and gives every follower the same bytes."""

    def __init__(self, sources: OverviewSources) -> None:
        self._sources = sources
        self._published = _Published()
        self._changed = asyncio.Condition()
        self._followers = 0
        self._task: asyncio.Task[None] | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._readiness: Readiness | None = None
        self._depths: list[QueueDepth] = []
        self._oldest: dict[Queue, tuple[float, int]] = {}
        """When each queue was looked at, in monotonic seconds, and when its oldest job was stored."""
        self._service_s: dict[tuple[Capability, str], tuple[float, float | None]] = {}
        self._dead_letters: dict[str, int] = {}
        self._storage: StorageUsage | None = None
        self._next_slow_read = 0.0
        self._stale_since: float | None = None

    async def start(self) -> None:
        """Do nothing: the first follower starts the computation."""

    async def close(self) -> None:
        """Stop the computation."""
        for task in (self._task, self._health_task):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def read(self) -> Frame:
        """Return the overview, at most about a second old. Raises Unavailable."""
        if not self._published.is_fresh:
            number = self._published.number
            self._run()
            try:
                async with asyncio.timeout(READ_TIMEOUT_S * 4):
                    await self._wait_for(number + 1)
            except TimeoutError:
                raise Unavailable("The overview could not be computed in time; retry shortly.") from None
        return self._published.frame()

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """Yield the whole overview as a server-sent event, then each second what has changed. A slow follower skips to the
        whole again. The caller closes the generator.
        """
        self._followers += 1
        self._sources.traffic.begin_following()
        try:
            self._run()
            if not self._published.is_fresh:
                await self._wait_for(self._published.number + 1)
            number = self._published.number
            yield self._published.event()
            while True:
                await self._wait_for(number + 1)
                latest = self._published
                event = latest.changes if latest.number == number + 1 else latest.event()
                number = latest.number
                yield event
        finally:
            self._followers -= 1

    async def _wait_for(self, number: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._published.number >= number)

    def _run(self) -> None:
        """Make the computation run for the present followers."""
        if self._task is None:
            self._task = asyncio.create_task(self._compute_while_followed())

    async def _compute_while_followed(self) -> None:
        self._health_task = asyncio.create_task(self._check_health_forever())
        idle_since = monotonic()
        try:
            while self._followers or monotonic() - idle_since < LINGER_S:
                began = monotonic()
                if self._followers:
                    idle_since = began
                try:
                    await self._publish(await self._compute())
                except Exception:
                    log.exception("overview.computation_crashed")
                await asyncio.sleep(max(0.1, INTERVAL_S - (monotonic() - began)))
        finally:
            self._health_task.cancel()
            self._sources.traffic.follows = False
            self._task = None

    async def _check_health_forever(self) -> None:
        while True:
            self._readiness = await self._sources.check_readiness()
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _compute(self) -> _Published:
        """Compute the overview. While NATS is away, the rows are the last known ones."""
        sources, last = self._sources, self._published
        bus, snapshot = sources.bus, sources.dispatcher.registry.snapshot or RegistrySnapshot()
        try:
            if not bus.connected:
                raise TimeoutError
            async with asyncio.timeout(READ_TIMEOUT_S):
                await self._read_nats()
            self._stale_since = None
        except (NexusError, TimeoutError):
            self._stale_since = self._stale_since or last.at or now()
        await self._read_service_times(snapshot)
        inputs = OverviewInputs(
            snapshot,
            self._depths,
            {queue: at for queue, (_, at) in self._oldest.items()},
            sources.traffic.recent(),
            self._service_times(),
            self._dead_letters,
            sources.dispatcher.is_paused,
        )
        rows = make_rows(inputs)
        found = attention(
            rows,
            snapshot,
            readiness=self._readiness,
            storage=self._storage,
            connected=self._stale_since is None,
            ledger_lag_s=sources.ledger_lag_s(),
        )
        return _Published(last.number + 1, now(), monotonic(), self._stale_since, rows, found, sources.traffic.gateways)

    async def _publish(self, new: _Published) -> None:
        new.changes = _changes(self._published, new)
        self._published = new
        async with self._changed:
            self._changed.notify_all()

    # Readings

    async def _read_nats(self) -> None:
        """Read the queues each time, and what changes slowly now and then. Raises Unavailable, TimeoutError."""
        bus = self._sources.bus
        self._depths = await bus.queue_depths()
        await self._read_oldest()
        if monotonic() >= self._next_slow_read:
            self._storage, self._dead_letters = await asyncio.gather(bus.storage_usage(), bus.dead_letter_counts())
            self._next_slow_read = monotonic() + SLOW_INTERVAL_S

    async def _read_oldest(self) -> None:
        waiting = {depth.queue: depth for depth in self._depths if depth.waiting}
        self._oldest = {queue: seen for queue, seen in self._oldest.items() if queue in waiting}
        due = sorted(waiting, key=lambda queue: self._oldest.get(queue, (0.0, 0))[0])[:MAX_OLDEST_READ]
        found = await asyncio.gather(*(self._sources.bus.oldest_queued_at(waiting[queue]) for queue in due))
        for queue, at in zip(due, found, strict=True):
            if at is None:
                self._oldest.pop(queue, None)
            else:
                self._oldest[queue] = monotonic(), at

    async def _read_service_times(self, snapshot: RegistrySnapshot) -> None:
        """Read some of the service times, those that were read longest ago. Without Redis, the last ones are used."""
        served = {
            (capability, offer.name)
            for worker in snapshot.workers.values()
            for offer in worker.models
            for capability in offer.capabilities
            if capability not in MANAGEMENT
        }
        self._service_s = {key: seen for key, seen in self._service_s.items() if key in served}
        oldest = monotonic() - HEALTH_INTERVAL_S
        due = sorted(
            (key for key in served if self._service_s.get(key, (0.0, None))[0] <= oldest),
            key=lambda key: self._service_s.get(key, (0.0, None))[0],
        )[:MAX_SERVICE_TIMES_READ]
        with contextlib.suppress(NexusError, TimeoutError):
            async with asyncio.timeout(READ_TIMEOUT_S):
                found = await asyncio.gather(
                    *(self._sources.store.mean_service_time_s(capability.value, model) for capability, model in due)
                )
                self._service_s |= {key: (monotonic(), one) for key, one in zip(due, found, strict=True)}

    def _service_times(self) -> dict[str, float]:
        """Return the longest service time of each model's capabilities."""
        found: dict[str, float] = {}
        for (_, model), (_, seconds) in self._service_s.items():
            if seconds is not None:
                found[model] = max(seconds, found.get(model, 0.0))
        return found


def _changes(last: _Published, new: _Published) -> bytes:
    """Return the event that turns the last overview into the new one."""
    frame = new.head() | {"models": [row for name, row in new.rows.items() if last.rows.get(name) != row]}
    if removed := [name for name in last.rows if name not in new.rows]:
        frame["removed"] = removed
    if new.attention != last.attention:
        frame["attention"] = new.attention
    return b"event: changes\ndata: %b\n\n" % orjson.dumps(frame)
