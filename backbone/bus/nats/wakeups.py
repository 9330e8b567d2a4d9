"""Subscriptions to wake-up notifications: a worker learns which of its queues got a job, without polling them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from backbone.bus.bus import Queue
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.subjects import QUEUE_HOLDS_JOBS, WAKEUPS, encode_model
from schemas.jobs import Capability, Lane

WakeupCallback = Callable[[Queue], None]
ModelGroup = tuple[Capability, str]
"""A capability of a model: all its lanes."""


class WakeupSubscriptions:
    """Holds one subscription for all lanes of a model's capability, or one per lane while some lanes are muted."""

    def __init__(self, connection: NatsConnection) -> None:
        self._connection = connection
        self._lanes: dict[ModelGroup, set[Lane]] = {}
        self._muted: dict[ModelGroup, set[Lane]] = {}
        self._subscribed: dict[str, int] = {}
        self._queues: dict[bytes, Queue] = {}
        self._on_wakeup: WakeupCallback | None = None
        self._on_recheck: WakeupCallback | None = None
        self._lock = asyncio.Lock()

    async def serve(
        self, queues: list[Queue], on_wakeup: WakeupCallback | None, on_recheck: WakeupCallback | None
    ) -> None:
        """Subscribe to exactly these queues, or to none without `on_wakeup`. Muted queues stay muted."""
        self._on_wakeup, self._on_recheck = on_wakeup, on_recheck
        before, self._lanes, self._queues = self._lanes, {}, {}
        for queue in queues if on_wakeup else []:
            self._lanes.setdefault((queue.capability, queue.model), set()).add(queue.lane)
            self._queues[_subject(queue)] = queue
        async with self._lock:
            for group in before.keys() - self._lanes.keys():
                self._muted.pop(group, None)
                await self._update_subscriptions(group, before[group])
            for group in self._lanes:
                await self._update_subscriptions(group, before.get(group, set()))

    async def set_muted(self, queue: Queue, *, muted: bool) -> None:
        """Mute or unmute one queue, in effect for what is written to the connection after it."""
        group = (queue.capability, queue.model)
        async with self._lock:
            lanes = self._lanes.get(group)
            if lanes is None:
                return  # not served any more: it must not be muted when it is served again
            muted_lanes = self._muted.setdefault(group, set())
            (muted_lanes.add if muted else muted_lanes.discard)(queue.lane)
            await self._update_subscriptions(group, lanes)
            if not muted_lanes:
                del self._muted[group]

    async def _update_subscriptions(self, group: ModelGroup, before: set[Lane]) -> None:
        """Subscribe to the wanted subjects of one group, then unsubscribe from the rest."""
        wanted = self._wanted_subjects(group)
        for subject in wanted:
            if subject not in self._subscribed:
                self._subscribed[subject] = await self._connection.subscribe(subject, self._on_message)
        for subject in {_lane(group, "*"), *(_lane(group, lane) for lane in before)} - wanted:
            if subject in self._subscribed:
                self._connection.drop_subscription(self._subscribed.pop(subject))

    def _wanted_subjects(self, group: ModelGroup) -> set[str]:
        lanes, muted_lanes = self._lanes.get(group, set()), self._muted.get(group, set())
        if not lanes:
            return set()
        return {_lane(group, lane) for lane in lanes - muted_lanes} if muted_lanes else {_lane(group, "*")}

    def _on_message(self, subject: bytes, _reply: bytes, _headers: bytes, data: bytes) -> None:
        queue = self._queues.get(subject)
        if queue is None:
            return
        if data == QUEUE_HOLDS_JOBS:
            if self._on_recheck is not None:
                self._on_recheck(queue)
        elif self._on_wakeup is not None:
            self._on_wakeup(queue)


def _lane(group: ModelGroup, lane: str) -> str:
    return f"{WAKEUPS}.{group[0]}.{lane}.{encode_model(group[1])}"


def _subject(queue: Queue) -> bytes:
    return _lane((queue.capability, queue.model), queue.lane).encode()
