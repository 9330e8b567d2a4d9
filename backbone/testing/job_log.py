"""Implement the durable job log in memory, with the guarantees of NATS's within one event loop."""

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
from backbone.testing.bus import MAX_MESSAGE_BYTES, MemoryBroker
from backbone.testing.job_log_state import GateHandler, JobWatcher, StoredItem, WorkQueueState
from schemas.errors import RequestTooLarge, Unavailable
from schemas.frames import FrameKind
from schemas.job_events import GateReply, GateRequest
from schemas.jobs import Envelope
from schemas.outcome import Outcome

MAX_UNCONFIRMED_EVENTS = 1000
MAX_UNCONFIRMED_BYTES = 4 * 1024 * 1024


class _BrokerClient:
    """The connection to a memory broker that both sides of the job log share."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.closed = False
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Check that the broker is available."""
        self.broker.require()

    def require(self) -> None:
        """Raise Unavailable while the broker is away, or after this side was closed."""
        if self.closed:
            raise Unavailable("This connection to the memory broker was closed.")
        self.broker.require()

    def spawn(self, item: Awaitable[None]) -> None:
        """Run a coroutine in a task that ends when this side is closed."""

        async def run() -> None:
            await item

        task = asyncio.create_task(run())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def end_tasks(self) -> None:
        """Cancel the tasks that `spawn` started."""
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class MemoryJobLog(_BrokerClient):
    """The gateway's side: see `backbone.bus.job_log.JobLog`."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        self._watchers: list[JobWatcher] = []
        self._consumers: set[asyncio.Event] = set()
        self._gate_handlers: list[GateHandler] = []

    async def close(self) -> None:
        """Stop serving gate requests. Readers and consumers get Unavailable."""
        self.closed = True
        for handler in self._gate_handlers:
            self.broker.job_log.gate_handlers.remove(handler)
        self._gate_handlers = []
        for watcher in self._watchers:
            watcher.wake.set()
        for event in self._consumers:
            event.set()
        await self.end_tasks()

    @property
    def seal_secret(self) -> SealSecret | None:
        return self.broker.job_log.secret

    # The queue

    async def enqueue(self, envelope: Envelope, body: bytes, *, replaces: int = 0) -> int:
        self.require()
        if len(body) > MAX_MESSAGE_BYTES:
            raise RequestTooLarge
        encode_model(envelope.model)
        queue = Queue(envelope.capability, envelope.lane, envelope.model)
        message_id = f"{require_token(envelope.job)}.{envelope.run}"
        if replaces:
            message_id += f".{replaces}"
        return self.broker.store(queue, envelope.encode(body), message_id, envelope.owner)

    async def queue_position(self, queue: Queue, seq: int) -> int | None:
        self.require()
        return self.broker.position(queue, seq)

    async def delete_job(self, queue: Queue, seq: int, job: str, run: int) -> None:
        self.require()
        stored = self.broker.jobs.get(seq)
        if stored is not None and stored.queue == queue and self._is_of(seq, job, run):
            self.broker.delete_job(seq)

    async def read_job(self, seq: int, job: str, run: int) -> bytes | None:
        self.require()
        stored = self.broker.jobs.get(seq)
        return stored.message if stored is not None and self._is_of(seq, job, run) else None

    def _is_of(self, seq: int, job: str, run: int) -> bool:
        names = (name for name, stored in self.broker.seq_by_message_id.items() if stored == seq)
        return any(f"{name}.".startswith(f"{job}.{run}.") for name in names)

    # Events

    async def append_event(self, job: str, frame: bytes) -> None:
        self.require()
        self.broker.job_log.append_event(require_token(job), frame)

    def append_event_unconfirmed(self, job: str, frame: bytes) -> None:
        """Store an event if the broker is available."""
        if self.broker.available:
            self.broker.job_log.append_event(require_token(job), frame)

    async def first_events(self, job: str, count: int) -> list[StoredEvent]:
        self.require()
        return self.broker.job_log.events.get(job, [])[:count]

    @contextlib.contextmanager
    def _watch(self, job: str) -> Iterator[JobWatcher]:
        watcher = self.broker.job_log.watch(require_token(job))
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            self.broker.job_log.unwatch(watcher)
            self._watchers = [one for one in self._watchers if one is not watcher]

    async def follow_events(self, job: str, after: int = 0) -> AsyncGenerator[StoredEvent | None, None]:
        self.require()
        must_yield_none = True
        with self._watch(job) as watcher:
            while True:
                watcher.wake.clear()
                if self.closed:
                    self.require()
                if watcher.ended:
                    watcher.ended, must_yield_none = False, True
                if self.broker.available:
                    for event in self._events_after(job, after):
                        after = event.seq
                        yield event
                    if must_yield_none and not watcher.wake.is_set():
                        must_yield_none = False
                        yield None
                await watcher.wake.wait()

    def _events_after(self, job: str, after: int) -> list[StoredEvent]:
        return [event for event in self.broker.job_log.events.get(job, []) if event.seq > after]

    # Outcomes

    async def store_outcome(self, outcome: Outcome, payload: bytes = b"") -> bool:
        self.require()
        require_token(outcome.job)
        return self.broker.job_log.store_outcome(outcome, payload)

    async def read_outcome(self, job: str) -> StoredOutcome | None:
        self.require()
        return self.broker.job_log.outcomes.get(job)

    async def list_jobs(self) -> list[str]:
        self.require()
        return sorted({*self.broker.job_log.events, *self.broker.job_log.outcomes})

    async def delete_outcome(self, job: str, seq: int) -> None:
        self.require()
        self.broker.job_log.delete_outcome(job, seq)

    @asynccontextmanager
    async def watch_outcome(self, job: str) -> AsyncIterator[Callable[[float], Awaitable[bool]]]:
        self.require()
        with self._watch(job) as watcher:

            async def wait(seconds: float) -> bool:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        while not watcher.ended:
                            await watcher.wake.wait()
                            watcher.wake.clear()
                            if self.closed:
                                self.require()
                return watcher.ended

            yield wait

    async def consume_outcomes(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        async with contextlib.aclosing(
            self.consume_queue(self.broker.job_log.outcome_queue, max_unacked, ack_wait_s)
        ) as items:
            async for item in items:
                yield item

    # Gate requests

    async def serve_gate_requests(self, handler: GateHandler) -> None:
        self.require()
        self._gate_handlers.append(handler)
        self.broker.job_log.gate_handlers.append(handler)

    # Dead letters

    async def list_dead_letters(self, *, before: int | None = None, limit: int = 100) -> list[StoredDeadLetter]:
        self.require()
        letters = [one for one in reversed(self.broker.job_log.dead_letters) if before is None or one.seq < before]
        return letters[:limit]

    async def find_dead_letter(self, job: str) -> StoredDeadLetter | None:
        self.require()
        return next((one for one in reversed(self.broker.job_log.dead_letters) if one.outcome.job == job), None)

    async def delete_dead_letter(self, seq: int) -> bool:
        self.require()
        records = self.broker.job_log
        remaining = [one for one in records.dead_letters if one.seq != seq]
        there, records.dead_letters = len(remaining) < len(records.dead_letters), remaining
        return there

    # Claims

    async def claim(self, name: str, value: bytes) -> bytes:
        self.require()
        return self.broker.job_log.claims.setdefault(require_token(name), value)

    # Content keys

    async def claim_content_key(self, job: str, value: bytes) -> bytes:
        self.require()
        return self.broker.job_log.content_keys.setdefault(require_token(job), value)

    async def read_content_key(self, job: str) -> bytes | None:
        self.require()
        return self.broker.job_log.content_keys.get(job)

    async def erase_content_key(self, job: str) -> None:
        self.require()
        self.broker.job_log.content_keys.pop(job, None)

    # Work queues

    def work_queue(self, name: str) -> MemoryWorkQueue:
        """Return the queue of this name, which all gateways of the broker share."""
        work_queue_stream(name)
        return MemoryWorkQueue(self, self.broker.job_log.work_queues.setdefault(name, WorkQueueState()))

    async def consume_queue(
        self, queue: WorkQueueState, max_unacked: int, ack_wait_s: float
    ) -> AsyncGenerator[WorkItem, None]:
        """Yield the items of a queue, at most `max_unacked` of which this consumer has at once."""
        wake = asyncio.Event()
        self._consumers.add(wake)
        queue.consumers.add(wake)
        unacked: set[MemoryWorkItem] = set()
        try:
            while True:
                if self.closed:
                    self.require()
                wake.clear()
                now = time.monotonic()
                unacked = {item for item in unacked if item.until > now}
                stored = queue.pop() if len(unacked) < max_unacked and self.broker.available else None
                if stored is None:
                    next_free_s = min((item.until - now for item in unacked), default=None)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(next_free_s):
                            await wake.wait()
                    continue
                item = MemoryWorkItem(self.require, queue, stored, ack_wait_s, wake)
                unacked.add(item)
                yield item
        finally:
            self._consumers.discard(wake)
            queue.consumers.discard(wake)


class MemoryWorkItem:
    """One delivery of an item: see `backbone.bus.job_log.WorkItem`."""

    def __init__(
        self,
        require: Callable[[], None],
        queue: WorkQueueState,
        item: StoredItem,
        ack_wait_s: float,
        wake: asyncio.Event,
    ) -> None:
        self._require = require
        self._queue = queue
        self._item = item
        self._ack_wait_s = ack_wait_s
        self._wake = wake
        self.id = item.id
        self.data = item.data
        self.delivery = item.deliveries
        self.stored_at = item.stored_at
        self.until = 0.0
        self._renew()

    def _renew(self) -> None:
        self.until = time.monotonic() + self._ack_wait_s
        self._queue.redeliver_in(self._item, self._ack_wait_s)

    @property
    def _owned(self) -> bool:
        return time.monotonic() < self.until and self._item.deliveries == self.delivery

    async def ack(self) -> None:
        """Remove the item, also after its `ack_wait_s`."""
        self._require()
        self._queue.remove(self._item)
        self._release()

    def nak(self, delay_s: float) -> None:
        if self._owned:
            self._queue.redeliver_in(self._item, max(0.0, delay_s))
        self._release()

    def extend(self) -> None:
        if self._owned:
            self._renew()

    def _release(self) -> None:
        self.until = 0.0
        self._wake.set()


class MemoryWorkQueue:
    """One queue of the gateways' own work: see `backbone.bus.job_log.WorkQueue`."""

    def __init__(self, log: MemoryJobLog, queue: WorkQueueState) -> None:
        self._log = log
        self._queue = queue

    async def put(self, item_id: str, data: bytes) -> None:
        self._log.require()
        self._queue.put(require_token(item_id), data)

    async def oldest(self) -> int | None:
        self._log.require()
        return min((item.stored_at for item in self._queue.items), default=None)

    def consume(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        return self._log.consume_queue(self._queue, max_unacked, ack_wait_s)


class MemoryWorkerLog(_BrokerClient):
    """The worker's side: see `backbone.bus.job_log.WorkerLog`."""

    async def close(self) -> None:
        self.closed = True
        await self.end_tasks()

    def event_writer(self, job: str) -> MemoryEventWriter:
        return MemoryEventWriter(self, require_token(job))

    def request_gate(self, request: GateRequest, on_answer: Callable[[GateReply | None], None]) -> None:
        """Send the request to one of the gateways, each in turn."""
        self.spawn(self._request_gate(request, on_answer))

    async def _request_gate(self, request: GateRequest, on_answer: Callable[[GateReply | None], None]) -> None:
        handlers = self.broker.job_log.gate_handlers
        answer = None
        if handlers and self.broker.available:
            handlers.rotate(-1)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    # Through JSON, as on the wire.
                    answer = await handlers[-1](GateRequest.model_validate_json(request.model_dump_json()))
        if request.kind is not FrameKind.RETURNED:
            on_answer(answer)

    async def store_outcome(self, outcome: Outcome, payload: bytes) -> bool:
        self.require()
        return self.broker.job_log.store_outcome(outcome, payload)

    async def store_dead_letter(self, outcome: Outcome, message: bytes) -> None:
        self.require()
        self.broker.job_log.store_dead_letter(outcome, message)


class MemoryEventWriter:
    """The events of one attempt: see `backbone.bus.job_log.EventWriter`. Those appended while the broker is away are stored when it is back."""

    def __init__(self, log: MemoryWorkerLog, job: str) -> None:
        self._log = log
        self._job = job
        self._unconfirmed: deque[bytes] = deque()
        self._flushed = asyncio.Event()
        self._flushed.set()
        self._closed = self._lost_events = False
        log.broker.job_log.on_reconnect.append(self._store)

    def append(self, frame: bytes) -> None:
        """Store an event, now or when the broker is back."""
        if self._closed:
            self._lost_events = True
            return
        self._unconfirmed.append(frame)
        self._flushed.clear()
        self._store()

    def _store(self) -> None:
        if not self._log.broker.available or self._log.closed:
            return
        while self._unconfirmed:
            self._log.broker.job_log.append_event(self._job, self._unconfirmed.popleft())
        self._flushed.set()

    @property
    def is_full(self) -> bool:
        """Return whether too many events, or too many bytes of them, are unconfirmed."""
        return (
            len(self._unconfirmed) >= MAX_UNCONFIRMED_EVENTS
            or sum(map(len, self._unconfirmed)) >= MAX_UNCONFIRMED_BYTES
        )

    async def flush(self) -> None:
        await self._flushed.wait()
        if self._lost_events:
            raise Unavailable("The writer was closed before all events of the attempt were stored.")

    def close(self) -> None:
        if not self._closed:
            self._closed, self._lost_events = True, self._lost_events or bool(self._unconfirmed)
            self._unconfirmed.clear()
            self._flushed.set()
            self._log.broker.job_log.on_reconnect.remove(self._store)
