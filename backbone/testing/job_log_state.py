"""What a memory broker keeps about durable jobs: as NATS keeps it, without its disk."""

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

Referee = Callable[[GateRequest], Awaitable[GateReply | None]]

WINDOW_S = 120.0


@dataclass(slots=True)
class JobWatcher:
    """Whoever waits for something about a job."""

    job: str
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False


@dataclass(eq=False, slots=True)
class StoredItem:
    """An item of a backlog."""

    id: str
    data: bytes
    deliveries: int = 0
    timer: asyncio.TimerHandle | None = None
    """Fires when it is to come again."""
    stored_at: int = field(default_factory=lambda: int(time.time()))


@dataclass(slots=True)
class WorkQueueState:
    """A backlog: what waits, and what somebody has."""

    waiting: deque[StoredItem] = field(default_factory=deque)
    items: set[StoredItem] = field(default_factory=set)
    seen: dict[str, float] = field(default_factory=dict)
    takers: set[asyncio.Event] = field(default_factory=set)

    def put(self, item_id: str, data: bytes) -> None:
        """Add an item, once per id and window."""
        now = time.monotonic()
        if now - self.seen.get(item_id, -WINDOW_S) >= WINDOW_S:
            self.seen[item_id] = now
            self.add(item_id, data)

    def add(self, item_id: str, data: bytes) -> StoredItem:
        """Add an item."""
        work = StoredItem(item_id, data)
        self.items.add(work)
        self.waiting.append(work)
        self.wake()
        return work

    def take(self) -> StoredItem | None:
        """The next one that waits."""
        if not self.waiting:
            return None
        work = self.waiting.popleft()
        work.deliveries += 1
        return work

    def later(self, work: StoredItem, delay_s: float) -> None:
        """It comes again after that, unless it is settled."""
        if work.timer is not None:
            work.timer.cancel()
        work.timer = asyncio.get_running_loop().call_later(delay_s, self._again, work)

    def _again(self, work: StoredItem) -> None:
        work.timer = None
        if work in self.items:
            self.waiting.append(work)
            self.wake()

    def forget(self, work: StoredItem) -> None:
        """It is done."""
        self.items.discard(work)
        if work.timer is not None:
            work.timer.cancel()
            work.timer = None
        if work in self.waiting:
            self.waiting.remove(work)

    def wake(self) -> None:
        """Something waits."""
        for event in self.takers:
            event.set()


@dataclass(slots=True)
class JobLogState:
    """Events, terminal words, dead letters, claims, backlogs."""

    events: dict[str, list[StoredEvent]] = field(default_factory=dict)
    outcomes: dict[str, StoredOutcome] = field(default_factory=dict)
    told: dict[str, StoredItem] = field(default_factory=dict)
    """The item by which gateways take the word on a job."""
    dead: list[StoredDeadLetter] = field(default_factory=list)
    buried: dict[str, float] = field(default_factory=dict)
    claims: dict[str, bytes] = field(default_factory=dict)
    backlogs: dict[str, WorkQueueState] = field(default_factory=dict)
    recorder: WorkQueueState = field(default_factory=WorkQueueState)
    referees: deque[Referee] = field(default_factory=deque)
    by_job: dict[str, list[JobWatcher]] = field(default_factory=dict)
    returning: list[Callable[[], None]] = field(default_factory=list)
    """Called when the broker is there again."""
    secret: SealSecret = field(default_factory=lambda: SealSecret(os.urandom(SECRET_BYTES), int(time.time()) - 1))
    last_event: int = 0
    last_word: int = 0
    last_dead: int = 0

    def changed(self, available: bool) -> None:
        """The broker went away or came back."""
        if available:
            for call in list(self.returning):
                call()
            for queue in [self.recorder, *self.backlogs.values()]:
                queue.wake()

    def follow(self, job: str) -> JobWatcher:
        """Be woken by what happens to a job."""
        follower = JobWatcher(job)
        self.by_job.setdefault(job, []).append(follower)
        return follower

    def leave(self, follower: JobWatcher) -> None:
        """Be woken no more."""
        followers = self.by_job.get(follower.job, [])
        # Followers of one job are equal: it is this very one that leaves.
        self.by_job[follower.job] = [one for one in followers if one is not follower]
        if not self.by_job[follower.job]:
            del self.by_job[follower.job]

    def say(self, job: str, frame: bytes) -> None:
        """Keep an event."""
        self.last_event += 1
        self.events.setdefault(job, []).append(StoredEvent(self.last_event, frame, int(time.time())))
        for follower in self.by_job.get(job, []):
            follower.wake.set()

    def decide(self, outcome: Outcome, payload: bytes) -> bool:
        """Keep the first word."""
        if outcome.job in self.outcomes:
            return False
        self.last_word += 1
        self.outcomes[outcome.job] = StoredOutcome(outcome, payload, self.last_word, int(time.time()))
        self.told[outcome.job] = self.recorder.add(outcome.job, outcome.encode(payload))
        for follower in self.by_job.get(outcome.job, []):
            follower.ended = True
            follower.wake.set()
        return True

    def undecide(self, job: str, seq: int) -> None:
        """Forget a word, whoever has yet to take it."""
        decision = self.outcomes.get(job)
        if decision is not None and decision.seq == seq:
            del self.outcomes[job]
            self.recorder.forget(self.told.pop(job))

    def bury(self, outcome: Outcome, message: bytes) -> None:
        """Keep a dead letter, once per run and window."""
        id_, now = f"{outcome.job}.{outcome.run}", time.monotonic()
        if now - self.buried.get(id_, -WINDOW_S) < WINDOW_S:
            return
        self.buried[id_] = now
        self.last_dead += 1
        self.dead.append(StoredDeadLetter(self.last_dead, outcome, message, int(time.time())))
