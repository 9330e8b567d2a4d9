"""Hold the data of durable jobs that a memory broker stores, as NATS stores it on disk."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from backbone.bus.job_log import StoredDeadLetter, StoredEvent, StoredOutcome
from backbone.bus.seals import SECRET_BYTES, SealSecret
from schemas.job_events import GateReply, GateRequest
from schemas.outcome import Outcome

GateHandler = Callable[[GateRequest], Awaitable[GateReply | None]]

DUPLICATE_WINDOW_S = 120.0
"""NATS's: a message id that comes again within it is stored once."""


@dataclass(slots=True)
class JobWatcher:
    """A reader that waits for the next event or the outcome of one job."""

    job: str
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False


@dataclass(eq=False, slots=True)
class StoredItem:
    """An item of a work queue, with its redelivery timer."""

    id: str
    data: bytes
    deliveries: int = 0
    timer: asyncio.TimerHandle | None = None
    """Fires when the item is to be delivered again."""
    stored_at: int = field(default_factory=lambda: int(time.time()))


@dataclass(slots=True)
class WorkQueueState:
    """The items of one work queue: those that wait, and those that a consumer has."""

    waiting: deque[StoredItem] = field(default_factory=deque)
    items: set[StoredItem] = field(default_factory=set)
    stored_at_by_id: dict[str, float] = field(default_factory=dict)
    consumers: set[asyncio.Event] = field(default_factory=set)

    def put(self, item_id: str, data: bytes) -> None:
        """Store an item, once per id within the duplicate window."""
        now = time.monotonic()
        if now - self.stored_at_by_id.get(item_id, -DUPLICATE_WINDOW_S) >= DUPLICATE_WINDOW_S:
            self.stored_at_by_id[item_id] = now
            self.add(item_id, data)

    def add(self, item_id: str, data: bytes) -> StoredItem:
        """Store an item without looking for duplicates."""
        item = StoredItem(item_id, data)
        self.items.add(item)
        self.waiting.append(item)
        self.wake_consumers()
        return item

    def pop(self) -> StoredItem | None:
        """Remove and return the next waiting item; None when none waits."""
        if not self.waiting:
            return None
        item = self.waiting.popleft()
        item.deliveries += 1
        return item

    def redeliver_in(self, item: StoredItem, delay_s: float) -> None:
        """Let the item wait again after the delay, unless it is removed before."""
        if item.timer is not None:
            item.timer.cancel()
        item.timer = asyncio.get_running_loop().call_later(delay_s, self._redeliver, item)

    def _redeliver(self, item: StoredItem) -> None:
        item.timer = None
        if item in self.items:
            self.waiting.append(item)
            self.wake_consumers()

    def remove(self, item: StoredItem) -> None:
        """Remove an acknowledged item and its timer."""
        self.items.discard(item)
        if item.timer is not None:
            item.timer.cancel()
            item.timer = None
        if item in self.waiting:
            self.waiting.remove(item)

    def wake_consumers(self) -> None:
        """Wake every consumer: an item may be waiting."""
        for event in self.consumers:
            event.set()


@dataclass(slots=True)
class JobLogState:
    """The events, outcomes, dead letters, claims and work queues of one memory broker."""

    events: dict[str, list[StoredEvent]] = field(default_factory=dict)
    outcomes: dict[str, StoredOutcome] = field(default_factory=dict)
    outcome_items: dict[str, StoredItem] = field(default_factory=dict)
    """The item of `outcome_queue` for each outcome."""
    outcome_queue: WorkQueueState = field(default_factory=WorkQueueState)
    dead_letters: list[StoredDeadLetter] = field(default_factory=list)
    dead_letter_times: dict[str, float] = field(default_factory=dict)
    claims: dict[str, bytes] = field(default_factory=dict)
    content_keys: dict[str, bytes] = field(default_factory=dict)
    work_queues: dict[str, WorkQueueState] = field(default_factory=dict)
    gate_handlers: deque[GateHandler] = field(default_factory=deque)
    watchers: dict[str, list[JobWatcher]] = field(default_factory=dict)
    on_reconnect: list[Callable[[], None]] = field(default_factory=list)
    """Called when the broker is available again."""
    secret: SealSecret = field(default_factory=lambda: SealSecret(os.urandom(SECRET_BYTES), int(time.time()) - 1))
    last_event: int = 0
    last_outcome: int = 0
    last_dead_letter: int = 0

    def set_available(self, available: bool) -> None:
        """Resume what waited for the broker, once it is available again."""
        if available:
            for call in list(self.on_reconnect):
                call()
            for queue in [self.outcome_queue, *self.work_queues.values()]:
                queue.wake_consumers()

    def watch(self, job: str) -> JobWatcher:
        """Return a watcher that is woken by each event and by the outcome of the job."""
        watcher = JobWatcher(job)
        self.watchers.setdefault(job, []).append(watcher)
        return watcher

    def unwatch(self, watcher: JobWatcher) -> None:
        """Remove a watcher."""
        watchers = self.watchers.get(watcher.job, [])
        # Watchers of one job are equal, so that only identity tells them apart.
        self.watchers[watcher.job] = [one for one in watchers if one is not watcher]
        if not self.watchers[watcher.job]:
            del self.watchers[watcher.job]

    def append_event(self, job: str, frame: bytes) -> None:
        """Store an event and wake the job's watchers."""
        self.last_event += 1
        self.events.setdefault(job, []).append(StoredEvent(self.last_event, frame, int(time.time())))
        for watcher in self.watchers.get(job, []):
            watcher.wake.set()

    def store_outcome(self, outcome: Outcome, payload: bytes) -> bool:
        """Store the outcome unless the job has one. Return whether this one was stored."""
        if outcome.job in self.outcomes:
            return False
        self.last_outcome += 1
        self.outcomes[outcome.job] = StoredOutcome(outcome, payload, self.last_outcome, int(time.time()))
        self.outcome_items[outcome.job] = self.outcome_queue.add(outcome.job, outcome.encode(payload))
        for watcher in self.watchers.get(outcome.job, []):
            watcher.ended = True
            watcher.wake.set()
        return True

    def delete_outcome(self, job: str, seq: int) -> None:
        """Delete the outcome stored under this sequence, and its item of the outcome queue."""
        stored = self.outcomes.get(job)
        if stored is not None and stored.seq == seq:
            del self.outcomes[job]
            self.outcome_queue.remove(self.outcome_items.pop(job))

    def store_dead_letter(self, outcome: Outcome, message: bytes) -> None:
        """Store a dead letter, once per run within the duplicate window."""
        run_id, now = f"{outcome.job}.{outcome.run}", time.monotonic()
        if now - self.dead_letter_times.get(run_id, -DUPLICATE_WINDOW_S) < DUPLICATE_WINDOW_S:
            return
        self.dead_letter_times[run_id] = now
        self.last_dead_letter += 1
        self.dead_letters.append(StoredDeadLetter(self.last_dead_letter, outcome, message, int(time.time())))
