"""The wake-up notifications that a worker hears: which of its queues got a job, without asking any of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from backbone.bus.bus import Queue
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.subjects import QUEUE_HOLDS_JOBS, WAKEUPS, encode_model
from schemas.jobs import Capability, Lane

WakeupCallback = Callable[[Queue], None]
Group = tuple[Capability, str]
"""A capability of a model: all its lanes."""


class WakeupSubscriptions:
    """One subscription for all lanes of a model's capability, or one a lane while others of them are hushed."""

    def __init__(self, wire: NatsConnection) -> None:
        self._wire = wire
        self._lanes: dict[Group, set[Lane]] = {}
        self._hushed: dict[Group, set[Lane]] = {}
        self._subscribed: dict[str, int] = {}
        self._queues: dict[bytes, Queue] = {}
        self._on_wakeup: WakeupCallback | None = None
        self._on_recheck: WakeupCallback | None = None
        self._lock = asyncio.Lock()

    async def serve(
        self, queues: list[Queue], on_wakeup: WakeupCallback | None, on_recheck: WakeupCallback | None
    ) -> None:
        """Hear of exactly these queues; of none without `on_wakeup`. Hushed ones stay so."""
        self._on_wakeup, self._on_recheck = on_wakeup, on_recheck
        before, self._lanes, self._queues = self._lanes, {}, {}
        for queue in queues if on_wakeup else []:
            self._lanes.setdefault((queue.capability, queue.model), set()).add(queue.lane)
            self._queues[_subject(queue)] = queue
        async with self._lock:
            for group in before.keys() - self._lanes.keys():
                self._hushed.pop(group, None)
                await self._follow(group, before[group])
            for group in self._lanes:
                await self._follow(group, before.get(group, set()))

    async def hush(self, queue: Queue, *, muted: bool) -> None:
        """Do not hear of one queue, or hear of it again. In effect for what is written to the connection after it."""
        group = (queue.capability, queue.model)
        async with self._lock:
            lanes = self._lanes.get(group)
            if lanes is None:
                return  # it is not served any more, and must be heard once it is again
            hushed = self._hushed.setdefault(group, set())
            (hushed.add if muted else hushed.discard)(queue.lane)
            await self._follow(group, lanes)
            if not hushed:
                del self._hushed[group]

    async def _follow(self, group: Group, before: set[Lane]) -> None:
        """Subscribe to what is wanted of one group, then drop the rest."""
        wanted = self._wanted(group)
        for subject in wanted:
            if subject not in self._subscribed:
                self._subscribed[subject] = await self._wire.subscribe(subject, self._rang)
        for subject in {_lane(group, "*"), *(_lane(group, lane) for lane in before)} - wanted:
            if subject in self._subscribed:
                self._wire.drop_subscription(self._subscribed.pop(subject))

    def _wanted(self, group: Group) -> set[str]:
        lanes, hushed = self._lanes.get(group, set()), self._hushed.get(group, set())
        if not lanes:
            return set()
        return {_lane(group, lane) for lane in lanes - hushed} if hushed else {_lane(group, "*")}

    def _rang(self, subject: bytes, _reply: bytes, _headers: bytes, data: bytes) -> None:
        queue = self._queues.get(subject)
        if queue is None:
            return
        if data == QUEUE_HOLDS_JOBS:
            if self._on_recheck is not None:
                self._on_recheck(queue)
        elif self._on_wakeup is not None:
            self._on_wakeup(queue)


def _lane(group: Group, lane: str) -> str:
    return f"{WAKEUPS}.{group[0]}.{lane}.{encode_model(group[1])}"


def _subject(queue: Queue) -> bytes:
    return _lane((queue.capability, queue.model), queue.lane).encode()
