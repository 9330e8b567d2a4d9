"""Durable jobs in memory, for fast tests: the same guarantees as NATS's, within one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

from backbone.bus.bus import Queue
from backbone.bus.job_log import StoredDeadLetter, StoredEvent, StoredOutcome, WorkItem
from backbone.bus.seals import SealSecret
from backbone.bus.subjects import encode_model, require_token, work_queue_stream
from backbone.testing.bus import MAX_MESSAGE, MemoryBroker
from backbone.testing.job_log_state import JobWatcher, Referee, StoredItem, WorkQueueState
from schemas.errors import RequestTooLarge, Unavailable
from schemas.frames import FrameKind
from schemas.job_events import GateReply, GateRequest
from schemas.jobs import Envelope
from schemas.outcome import Outcome

CROWD = 1000
CROWD_BYTES = 4 * 1024 * 1024


class _BrokerClient:
    """What both sides share."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.closed = False
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Whether the broker is there."""
        self.broker.require()

    def require(self) -> None:
        """Raise Unavailable when it is not."""
        if self.closed:
            raise Unavailable("this side of the memory broker is closed")
        self.broker.require()

    def spawn(self, work: Awaitable[None]) -> None:
        """Run it aside, until this side is closed."""

        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def end_tasks(self) -> None:
        """Cancel what runs aside."""
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class MemoryJobLog(_BrokerClient):
    """See backbone.bus.job_log.JobLog."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        self._followers: list[JobWatcher] = []
        self._takers: set[asyncio.Event] = set()
        self._referees: list[Referee] = []

    async def close(self) -> None:
        """Whoever follows or takes gets Unavailable."""
        self.closed = True
        for handler in self._referees:
            self.broker.records.referees.remove(handler)
        self._referees = []
        for follower in self._followers:
            follower.wake.set()
        for event in self._takers:
            event.set()
        await self.end_tasks()

    @property
    def seal_secret(self) -> SealSecret | None:
        """The broker's."""
        return self.broker.records.secret

    # The queue

    async def enqueue(self, envelope: Envelope, body: bytes) -> int:
        """Into the broker's queue, as any job."""
        self.require()
        if len(body) > MAX_MESSAGE:
            raise RequestTooLarge
        encode_model(envelope.model)
        queue = Queue(envelope.capability, envelope.lane, envelope.model)
        return self.broker.store(queue, envelope.encode(body), f"{require_token(envelope.job)}.{envelope.run}")

    async def queue_position(self, queue: Queue, seq: int) -> int | None:
        """Count those that wait before it."""
        self.require()
        job = self.broker.jobs.get(seq)
        if job is None or job.queue != queue:
            return None
        return sum(one.seq < seq for one in self.broker.waiting.get(queue, ()))

    async def delete_job(self, seq: int, job: str, run: int) -> None:
        """Forget it."""
        self.require()
        if self.broker.seen.get(f"{job}.{run}") == seq:
            self.broker.forget(seq)

    # Events

    async def append_event(self, job: str, frame: bytes) -> None:
        """Keep it."""
        self.require()
        self.broker.records.say(require_token(job), frame)

    def append_event_unconfirmed(self, job: str, frame: bytes) -> None:
        """Keep it, if the broker is there."""
        if self.broker.available:
            self.broker.records.say(require_token(job), frame)

    async def first_events(self, job: str, count: int) -> list[StoredEvent]:
        """From its list."""
        self.require()
        return self.broker.records.events.get(job, [])[:count]

    @contextlib.contextmanager
    def _follow(self, job: str) -> Iterator[JobWatcher]:
        follower = self.broker.records.follow(require_token(job))
        self._followers.append(follower)
        try:
            yield follower
        finally:
            self.broker.records.leave(follower)
            self._followers = [one for one in self._followers if one is not follower]

    async def follow_events(self, job: str, after: int = 0) -> AsyncGenerator[StoredEvent | None, None]:
        """Read its list on, whenever something happens to the job."""
        self.require()
        owed = True
        with self._follow(job) as follower:
            while True:
                follower.wake.clear()
                if self.closed:
                    self.require()
                if follower.ended:
                    follower.ended, owed = False, True
                if self.broker.available:
                    for event in self._after(job, after):
                        after = event.seq
                        yield event
                    if owed and not follower.wake.is_set():
                        owed = False
                        yield None
                await follower.wake.wait()

    def _after(self, job: str, after: int) -> list[StoredEvent]:
        return [event for event in self.broker.records.events.get(job, []) if event.seq > after]

    # Terminal words

    async def store_outcome(self, outcome: Outcome, payload: bytes = b"") -> bool:
        """Keep the first."""
        self.require()
        require_token(outcome.job)
        return self.broker.records.decide(outcome, payload)

    async def read_outcome(self, job: str) -> StoredOutcome | None:
        """The word."""
        self.require()
        return self.broker.records.outcomes.get(job)

    async def list_jobs(self) -> list[str]:
        """From both."""
        self.require()
        return sorted({*self.broker.records.events, *self.broker.records.outcomes})

    async def delete_outcome(self, job: str, seq: int) -> None:
        """Forget the word."""
        self.require()
        self.broker.records.undecide(job, seq)

    @asynccontextmanager
    async def watch_outcome(self, job: str) -> AsyncIterator[Callable[[float], Awaitable[bool]]]:
        """Follow the job."""
        self.require()
        with self._follow(job) as follower:

            async def wait(seconds: float) -> bool:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        while not follower.ended:
                            await follower.wake.wait()
                            follower.wake.clear()
                            if self.closed:
                                self.require()
                return follower.ended

            yield wait

    async def consume_outcomes(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        """From the work queue of words."""
        async with contextlib.aclosing(self.take(self.broker.records.recorder, max_unacked, ack_wait_s)) as items:
            async for item in items:
                yield item

    # Questions of workers

    async def serve_gate_requests(self, handler: Referee) -> None:
        """Join those who answer."""
        self.require()
        self._referees.append(handler)
        self.broker.records.referees.append(handler)

    # Dead letters

    async def list_dead_letters(self, *, before: int | None = None, limit: int = 100) -> list[StoredDeadLetter]:
        """From the list."""
        self.require()
        letters = [one for one in reversed(self.broker.records.dead) if before is None or one.seq < before]
        return letters[:limit]

    async def find_dead_letter(self, job: str) -> StoredDeadLetter | None:
        """The newest one."""
        self.require()
        return next((one for one in reversed(self.broker.records.dead) if one.outcome.job == job), None)

    async def delete_dead_letter(self, seq: int) -> bool:
        """Take it out."""
        self.require()
        records = self.broker.records
        kept = [one for one in records.dead if one.seq != seq]
        there, records.dead = len(kept) < len(records.dead), kept
        return there

    # Claims

    async def claim(self, name: str, value: bytes) -> bytes:
        """The first value stays."""
        self.require()
        return self.broker.records.claims.setdefault(require_token(name), value)

    # Backlogs

    def work_queue(self, name: str) -> MemoryWorkQueue:
        """Shared by all gateways of the broker."""
        work_queue_stream(name)
        return MemoryWorkQueue(self, self.broker.records.backlogs.setdefault(name, WorkQueueState()))

    async def take(self, queue: WorkQueueState, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        """Items of a work queue."""
        wake = asyncio.Event()
        self._takers.add(wake)
        queue.takers.add(wake)
        held: set[MemoryWorkItem] = set()
        try:
            while True:
                if self.closed:
                    self.require()
                wake.clear()
                now = time.monotonic()
                held = {item for item in held if item.until > now}
                work = queue.take() if len(held) < max_unacked and self.broker.available else None
                if work is None:
                    next_free = min((item.until - now for item in held), default=None)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(next_free):
                            await wake.wait()
                    continue
                item = MemoryWorkItem(self.require, queue, work, ack_wait_s, wake)
                held.add(item)
                yield item
        finally:
            self._takers.discard(wake)
            queue.takers.discard(wake)


class MemoryWorkItem:
    """See backbone.bus.job_log.WorkItem."""

    def __init__(
        self,
        require: Callable[[], None],
        queue: WorkQueueState,
        work: StoredItem,
        ack_wait_s: float,
        wake: asyncio.Event,
    ) -> None:
        self._require = require
        self._queue = queue
        self._work = work
        self._hold_s = ack_wait_s
        self._wake = wake
        self.id = work.id
        self.data = work.data
        self.delivery = work.deliveries
        self.stored_at = work.stored_at
        self.until = 0.0
        self._renew()

    def _renew(self) -> None:
        self.until = time.monotonic() + self._hold_s
        self._queue.later(self._work, self._hold_s)

    @property
    def _is_owned(self) -> bool:
        return time.monotonic() < self.until and self._work.deliveries == self.delivery

    async def ack(self) -> None:
        """Forget it, also when its time is up."""
        self._require()
        self._queue.forget(self._work)
        self._let_go()

    def nak(self, delay_s: float) -> None:
        """Let it come again."""
        if self._is_owned:
            self._queue.later(self._work, max(0.0, delay_s))
        self._let_go()

    def extend(self) -> None:
        """Its time begins anew."""
        if self._is_owned:
            self._renew()

    def _let_go(self) -> None:
        self.until = 0.0
        self._wake.set()


class MemoryWorkQueue:
    """See backbone.bus.job_log.WorkQueue."""

    def __init__(self, log: MemoryJobLog, queue: WorkQueueState) -> None:
        self._log = log
        self._queue = queue

    async def put(self, item_id: str, data: bytes) -> None:
        """Once per id within two minutes."""
        self._log.require()
        self._queue.put(require_token(item_id), data)

    def consume(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        """Shared with the other takers."""
        return self._log.take(self._queue, max_unacked, ack_wait_s)


class MemoryWorkerLog(_BrokerClient):
    """See backbone.bus.job_log.WorkerLog."""

    async def close(self) -> None:
        """No more is stored."""
        self.closed = True
        await self.end_tasks()

    def event_writer(self, job: str) -> MemoryEventWriter:
        """One per attempt; close it."""
        return MemoryEventWriter(self, require_token(job))

    def request_gate(self, request: GateRequest, on_answer: Callable[[GateReply | None], None]) -> None:
        """One of the gateways answers, each in its turn."""
        self.spawn(self._ask(request, on_answer))

    async def _ask(self, request: GateRequest, on_answer: Callable[[GateReply | None], None]) -> None:
        referees = self.broker.records.referees
        answer = None
        if referees and self.broker.available:
            referees.rotate(-1)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    # As it travels.
                    answer = await referees[-1](GateRequest.model_validate_json(request.model_dump_json()))
        if request.kind is not FrameKind.RETURNED:
            on_answer(answer)

    async def store_outcome(self, outcome: Outcome, payload: bytes) -> bool:
        """Keep the first."""
        self.require()
        return self.broker.records.decide(outcome, payload)

    async def store_dead_letter(self, outcome: Outcome, message: bytes) -> None:
        """Keep a dead letter."""
        self.require()
        self.broker.records.bury(outcome, message)


class MemoryEventWriter:
    """See backbone.bus.job_log.EventWriter. What is said while the broker is away is stored when it is back."""

    def __init__(self, log: MemoryWorkerLog, job: str) -> None:
        self._log = log
        self._job = job
        self._unconfirmed: deque[bytes] = deque()
        self._settled = asyncio.Event()
        self._settled.set()
        self._closed = self._lost = False
        log.broker.records.returning.append(self._store)

    def append(self, frame: bytes) -> None:
        """Store it, now or later."""
        if self._closed:
            self._lost = True
            return
        self._unconfirmed.append(frame)
        self._settled.clear()
        self._store()

    def _store(self) -> None:
        if not self._log.broker.available or self._log.closed:
            return
        while self._unconfirmed:
            self._log.broker.records.say(self._job, self._unconfirmed.popleft())
        self._settled.set()

    @property
    def is_full(self) -> bool:
        """Counted in events and in bytes."""
        return len(self._unconfirmed) >= CROWD or sum(map(len, self._unconfirmed)) >= CROWD_BYTES

    async def flush(self) -> None:
        """Wait until the broker is there."""
        await self._settled.wait()
        if self._lost:
            raise Unavailable("events of this attempt were not stored before it was closed")

    def close(self) -> None:
        """Forget."""
        if not self._closed:
            self._closed, self._lost = True, self._lost or bool(self._unconfirmed)
            self._unconfirmed.clear()
            self._settled.set()
            self._log.broker.records.returning.remove(self._store)
