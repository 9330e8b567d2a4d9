"""Implement the bus in memory, for fast tests, with the guarantees of NATS's within one event loop."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from backbone.bus.bus import MAX_FRESH_AGE_S, JobDelivery, Queue, QueueDepth, ReplyListener, StorageUsage, StreamUsage
from backbone.bus.fair_order import FairOrder
from backbone.bus.queue_listing import LANE_RANK, QueuedJob, QueuePage, parse_queued_job
from backbone.bus.subjects import JOBS_STREAM, encode_model
from backbone.clock import now
from backbone.testing.job_log_state import JobLogState
from schemas.errors import QueueFull, RequestTooLarge, Unavailable
from schemas.frames import STOP
from schemas.jobs import Envelope

MAX_MESSAGE_BYTES = 8 * 1024 * 1024


@dataclass(slots=True)
class _Job:
    """A stored job message."""

    seq: int
    queue: Queue
    owner: str
    message: bytes
    stored_at: float
    """In seconds of the loop's clock."""
    deliveries: int = 0
    ack_timer: asyncio.TimerHandle | None = None
    """Runs while a worker has the job; puts it back into its queue after `ack_wait_s`."""


@dataclass(slots=True)
class _Pull:
    """A worker's open request for jobs."""

    bus: MemoryWorkerBus
    queue: Queue
    left: int
    on_end: Callable[[Queue, int], None]
    timer: asyncio.TimerHandle | None = None


class _Line:
    """The waiting jobs of one queue: those that were returned, then each owner's in turn."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._returned: deque[_Job] = deque()
        self._by_owner: dict[str, deque[_Job]] = {}
        self.order = FairOrder(weight_of)

    def __len__(self) -> int:
        return len(self._returned) + self.order.total

    def __iter__(self) -> Iterator[_Job]:
        return itertools.chain(self._returned, *self._by_owner.values())

    def append(self, job: _Job) -> None:
        self._by_owner.setdefault(job.owner, deque()).append(job)
        self.order.add_waiting(job.owner)

    def appendleft(self, job: _Job) -> None:
        self._returned.appendleft(job)

    def popleft(self) -> _Job:
        if self._returned:
            return self._returned.popleft()
        owner = self.order.take()
        assert owner is not None
        return self._by_owner[owner].popleft()

    def remove(self, job: _Job) -> None:
        """Remove a job, if it waits."""
        waiting = self._by_owner.get(job.owner, deque())
        if job in self._returned:
            self._returned.remove(job)
        elif job in waiting:
            waiting.remove(job)
            self.order.set_waiting(job.owner, len(waiting))

    def position(self, job: _Job) -> int:
        """Return how many jobs start before this one."""
        if job in self._returned:
            return self._returned.index(job)
        waiting = self._by_owner.get(job.owner, deque())
        if job not in waiting:  # a worker has it
            return 0
        return len(self._returned) + self.order.position(job.owner, waiting.index(job))


@dataclass(slots=True)
class MemoryBroker:
    """The server that the memory implementations share. `available = False` makes every call fail as without NATS."""

    ack_wait_s: float = 15.0
    max_per_queue: int = 10_000
    away: bool = False
    jobs: dict[int, _Job] = field(default_factory=dict)
    waiting: dict[Queue, _Line] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    """The weights of owners; 1 for others."""
    pulls: dict[Queue, deque[_Pull]] = field(default_factory=dict)
    max_queues: int = 12_000
    open_queues: set[Queue] = field(default_factory=set)
    is_held: Callable[[str], bool] = lambda _: False
    """Whether the waiting jobs of a model are held."""
    listeners: dict[str, Callable[[bytes], bytes | None]] = field(default_factory=dict)
    """The receiver by reply subject, by prefix of reply subjects, or by control subject."""
    gateway_subscribers: dict[str, list[Callable[[bytes], None]]] = field(default_factory=dict)
    """The gateways' receivers by topic."""
    workers: list[MemoryWorkerBus] = field(default_factory=list)
    seq_by_message_id: dict[str, int] = field(default_factory=dict)
    last_seq: int = 0
    job_log: JobLogState = field(default_factory=JobLogState)
    """The data of durable jobs."""

    @property
    def available(self) -> bool:
        """Return whether the broker answers. Set it to simulate an outage."""
        return not self.away

    @available.setter
    def available(self, value: bool) -> None:
        self.away = not value
        self.job_log.set_available(value)

    def require(self) -> None:
        """Raise Unavailable while the broker is away."""
        if not self.available:
            raise Unavailable("The memory broker is away.")

    def store(self, queue: Queue, message: bytes, message_id: str, owner: str) -> int:
        """Store a job, once per `message_id`, and return its sequence. Raises QueueFull."""
        if message_id in self.seq_by_message_id:
            return self.seq_by_message_id[message_id]
        if sum(job.queue == queue for job in self.jobs.values()) >= self.max_per_queue:
            raise QueueFull
        self.last_seq += 1
        job = _Job(self.last_seq, queue, owner, message, asyncio.get_running_loop().time())
        self.jobs[job.seq] = job
        self.seq_by_message_id[message_id] = job.seq
        self._line(queue).append(job)
        for worker in list(self.workers):
            worker.wake(queue)
        self.serve_pulls(queue)
        return job.seq

    def _line(self, queue: Queue) -> _Line:
        if queue not in self.waiting:
            self.waiting[queue] = _Line(lambda owner: self.weights.get(owner, 1.0))
        return self.waiting[queue]

    def position(self, queue: Queue, seq: int) -> int | None:
        """Return how many waiting jobs start before this one; None: the queue does not hold it."""
        job = self.jobs.get(seq)
        if job is None or job.queue != queue:
            return None
        return self._line(queue).position(job)

    def open_queue(self, queue: Queue) -> None:
        """Create the queue if it is missing. Raises Unavailable when there are `max_queues` already."""
        encode_model(queue.model)
        if queue not in self.open_queues and len(self.open_queues) >= self.max_queues:
            raise Unavailable(
                f"There are {self.max_queues} queues, as many as this broker allows. Delete unused ones, or raise max_queues.",
                code="no_queue",
            )
        self.open_queues.add(queue)
        self.serve_pulls(queue)

    def has_jobs(self, queue: Queue) -> bool:
        """Return whether a job waits in this queue or was pulled from it."""
        return any(job.queue == queue for job in self.jobs.values())

    def serve_pulls(self, queue: Queue) -> None:
        """Deliver waiting jobs to the open pulls, each pull in turn."""
        waiting, pulls = self._line(queue), self.pulls.get(queue, deque())
        while waiting and pulls and queue in self.open_queues and not self.is_held(queue.model):
            job, pull = waiting.popleft(), pulls.popleft()
            if job.seq not in self.jobs:
                pulls.appendleft(pull)
                continue
            pull.left -= 1
            if pull.left:
                pulls.append(pull)
            elif pull.timer:
                pull.timer.cancel()
            self._deliver(job, pull.bus)

    def _deliver(self, job: _Job, bus: MemoryWorkerBus) -> None:
        job.deliveries += 1
        delivery = MemoryDelivery(self, job, job.deliveries, len(self.waiting.get(job.queue, ())))
        self.start_ack_timer(job)
        asyncio.get_running_loop().call_soon(bus.on_job, delivery)

    def start_ack_timer(self, job: _Job) -> None:
        """Leave the job to its worker for `ack_wait_s` from now."""
        if job.ack_timer:
            job.ack_timer.cancel()
        job.ack_timer = asyncio.get_running_loop().call_later(self.ack_wait_s, self.requeue, job)

    def requeue(self, job: _Job) -> None:
        """Put a delivered job back to the head of its queue."""
        if job.ack_timer:
            job.ack_timer.cancel()
            job.ack_timer = None
        if job.seq in self.jobs:
            self._line(job.queue).appendleft(job)
            self.serve_pulls(job.queue)

    def delete_job(self, seq: int) -> None:
        """Delete a job, whether it waits or a worker has it."""
        job = self.jobs.pop(seq, None)
        if job is None:
            return
        if job.ack_timer:
            job.ack_timer.cancel()
        self._line(job.queue).remove(job)


class MemoryDelivery:
    """One delivery of a job to a worker: see `backbone.bus.bus.JobDelivery`."""

    def __init__(self, broker: MemoryBroker, job: _Job, delivery: int, pending: int) -> None:
        self._broker = broker
        self._job = job
        self.queue = job.queue
        self.message = job.message
        self.delivery = delivery
        self.pending = pending
        self.age_s = asyncio.get_running_loop().time() - job.stored_at
        self.fresh = delivery == 1 and self.age_s <= MAX_FRESH_AGE_S
        self._settled = False

    @property
    def owned(self) -> bool:
        return not self._settled and self._job.ack_timer is not None and self._job.deliveries == self.delivery

    def ack(self) -> None:
        if self.owned:
            self._broker.delete_job(self._job.seq)
        self._settled = True

    def nak(self, delay_s: float = 0.0) -> None:
        if self.owned:
            if delay_s:
                asyncio.get_running_loop().call_later(delay_s, self._broker.requeue, self._job)
            else:
                self._broker.requeue(self._job)
        self._settled = True

    def extend(self) -> None:
        if self.owned:
            self._broker.start_ack_timer(self._job)


class MemoryGatewayBus:
    """The gateway's side: see `backbone.bus.bus.GatewayBus`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._prefix = f"reply.{secrets.token_hex(4)}."
        self._listeners: dict[str, ReplyListener] = {}
        self._unserved_since: dict[Queue, float] = {}

    async def start(self) -> None:
        self._broker.require()
        self._broker.listeners[self._prefix] = lambda _: None

    async def close(self) -> None:
        self._broker.listeners.pop(self._prefix, None)
        for reply in list(self._listeners):
            self._broker.listeners.pop(reply, None)

    @property
    def connected(self) -> bool:
        return self._broker.available

    @property
    def max_message_bytes(self) -> int:
        return MAX_MESSAGE_BYTES

    async def open_queue(self, queue: Queue) -> None:
        self._broker.require()
        self._broker.open_queue(queue)

    async def apply_holds(self, is_held: Callable[[str], bool]) -> None:
        self._broker.require()
        self._broker.is_held = is_held
        for queue in list(self._broker.waiting):
            for worker in list(self._broker.workers):
                worker.wake(queue)
            self._broker.serve_pulls(queue)

    async def free_queues(self, is_served: Callable[[Queue], bool], grace_s: float) -> int:
        self._broker.require()
        now, broker = asyncio.get_running_loop().time(), self._broker
        unserved = [queue for queue in broker.open_queues if not is_served(queue)]
        self._unserved_since = {queue: self._unserved_since.get(queue, now) for queue in unserved}
        unused = {
            queue for queue in unserved if now - self._unserved_since[queue] >= grace_s and not broker.has_jobs(queue)
        }
        broker.open_queues -= unused
        return len(unused)

    def is_queue_refused(self, queue: Queue) -> bool:
        return self.queues_are_full and queue not in self._broker.open_queues

    @property
    def queues_are_full(self) -> bool:
        return self.queue_count >= self._broker.max_queues

    @property
    def queue_count(self) -> int:
        return len(self._broker.open_queues)

    def new_reply_subject(self) -> str:
        return self._prefix + secrets.token_hex(16)

    def submit(self, envelope: Envelope, body: bytes, listener: ReplyListener, line: bytes = b"") -> None:
        """Store the job in the loop's next turn, as a server confirms later."""
        self._broker.require()
        if len(body) > MAX_MESSAGE_BYTES:
            raise RequestTooLarge
        encode_model(envelope.model)
        self._listeners[envelope.reply] = listener
        self._broker.listeners[envelope.reply] = listener.on_event
        asyncio.get_running_loop().call_soon(self._store, envelope, body, listener, line)

    def _store(self, envelope: Envelope, body: bytes, listener: ReplyListener, line: bytes) -> None:
        queue = Queue(envelope.capability, envelope.lane, envelope.model)
        try:
            self._broker.open_queue(queue)
            message = b"%b\n%b" % (line, body) if line else envelope.encode(body)
            seq = self._broker.store(queue, message, f"{envelope.job}.{envelope.run}", envelope.owner)
        except (QueueFull, Unavailable) as error:
            listener.on_refused(error)
            return
        listener.on_stored(seq)

    def release(self, reply: str) -> None:
        self._listeners.pop(reply, None)
        self._broker.listeners.pop(reply, None)

    def delete_job(self, seq: int) -> None:
        self._broker.delete_job(seq)

    async def queue_position(self, queue: Queue, seq: int) -> int | None:
        self._broker.require()
        return self._broker.position(queue, seq)

    def record_start(self, queue: Queue) -> None:
        """Do nothing: every job is delivered as soon as a worker pulls."""

    def record_use(self, queue: Queue, owner: str, seconds: float) -> None:
        line = self._broker.waiting.get(queue)
        if line is not None:
            line.order.record_use(owner, seconds)

    def on_job_moved(self, moved: Callable[[str, int, str, int], None]) -> None:
        """Do nothing: no job moves."""

    def send_control(self, worker: str, message: bytes) -> None:
        listener = self._broker.listeners.get(f"control.{worker}")
        if listener is not None:
            asyncio.get_running_loop().call_soon(listener, message)

    def listen(self, reply: str, on_message: Callable[[bytes], None]) -> None:
        def on_event(data: bytes) -> None:
            on_message(data)

        self._broker.listeners[reply] = on_event

    def send_reply(self, reply: str, message: bytes) -> None:
        """Call the listener in the loop's next turn."""
        listener = self._broker.listeners.get(reply)
        if listener is not None:
            asyncio.get_running_loop().call_soon(listener, message)

    def send_to_gateways(self, topic: str, message: bytes) -> None:
        """Call every subscriber in the loop's next turn."""
        if self._broker.available:
            for on_message in self._broker.gateway_subscribers.get(topic, ()):
                asyncio.get_running_loop().call_soon(on_message, message)

    async def subscribe_gateways(self, topic: str, on_message: Callable[[bytes], None]) -> None:
        self._broker.require()
        self._broker.gateway_subscribers.setdefault(topic, []).append(on_message)

    async def queue_depths(self) -> list[QueueDepth]:
        self._broker.require()
        counts: dict[Queue, list[int]] = {}
        for job in self._broker.jobs.values():
            counts.setdefault(job.queue, [0, 0])[job.ack_timer is not None] += 1
        return [QueueDepth(queue, waiting, running) for queue, (waiting, running) in counts.items()]

    async def oldest_queued_at(self, depth: QueueDepth) -> int | None:
        self._broker.require()
        waiting = [job for job in self._broker.jobs.values() if job.queue == depth.queue and job.ack_timer is None]
        age_s = max((asyncio.get_running_loop().time() - job.stored_at for job in waiting), default=None)
        return None if age_s is None else int(now() - age_s)

    async def list_jobs(self, model: str, after: str, limit: int) -> QueuePage:
        """Return a page of each queue in turn; cursors are positions here."""
        self._broker.require()
        first = int(after or 0)
        stored = [job for job in self._broker.jobs.values() if job.queue.model == model]
        waiting = sorted(
            (job for job in stored if job.ack_timer is None),
            key=lambda job: (LANE_RANK[job.queue.lane], self._broker.position(job.queue, job.seq) or 0),
        )
        found = [one for job in waiting[first : first + limit] if (one := self._listed(job)) is not None]
        running = [one for job in stored if job.ack_timer is not None and (one := self._listed(job)) is not None]
        has_more = len(waiting) > first + limit
        cursor = str(first + limit) if has_more else None
        return QueuePage(first, found, [] if after else running, len(waiting), cursor, has_more)

    def _listed(self, job: _Job) -> QueuedJob | None:
        age_s = asyncio.get_running_loop().time() - job.stored_at
        return parse_queued_job(job.queue, job.seq, job.message, int(now() - age_s))

    async def dead_letter_counts(self) -> dict[str, int]:
        self._broker.require()
        return Counter(letter.outcome.model for letter in self._broker.job_log.dead_letters)

    async def server_time_s(self) -> float:
        """Return this process's time."""
        self._broker.require()
        return now()

    async def storage_usage(self) -> StorageUsage:
        """Return the usage of the jobs stream, the only one that is counted here."""
        self._broker.require()
        jobs = self._broker.jobs.values()
        return StorageUsage((StreamUsage(JOBS_STREAM, len(jobs), sum(len(job.message) for job in jobs), None),), 0)

    async def ping(self) -> None:
        self._broker.require()


class MemoryWorkerBus:
    """The worker's side: see `backbone.bus.bus.WorkerBus`."""

    def __init__(self, broker: MemoryBroker, on_job: Callable[[JobDelivery], None]) -> None:
        self._broker = broker
        self.on_job = on_job
        self._queues: set[Queue] = set()
        self._muted: set[Queue] = set()
        self._on_wakeup: Callable[[Queue], None] | None = None
        self._on_recheck: Callable[[Queue], None] | None = None
        self._requests: dict[int, Callable[[bytes | None], None]] = {}
        self._next = 0
        self._control: str | None = None

    async def start(self) -> None:
        self._broker.require()
        self._broker.workers.append(self)

    async def close(self) -> None:
        await self.stop_pulling()
        if self in self._broker.workers:
            self._broker.workers.remove(self)
        if self._control:
            self._broker.listeners.pop(self._control, None)

    @property
    def connected(self) -> bool:
        return self._broker.available

    async def ping(self) -> None:
        self._broker.require()

    async def serve(
        self,
        queues: list[Queue],
        on_wakeup: Callable[[Queue], None] | None,
        on_recheck: Callable[[Queue], None] | None = None,
    ) -> None:
        self._queues = set(queues)
        self._muted &= self._queues
        self._on_wakeup = on_wakeup
        self._on_recheck = on_recheck

    async def set_muted(self, queue: Queue, *, muted: bool) -> None:
        (self._muted.add if muted else self._muted.discard)(queue)

    def wake(self, queue: Queue) -> None:
        """Call `on_wakeup` in the loop's next turn, for a job that was stored in a served queue."""
        if self._on_wakeup is not None and queue in self._queues - self._muted:
            asyncio.get_running_loop().call_soon(self._on_wakeup, queue)

    def pull(self, queue: Queue, batch: int, wait_s: float, on_end: Callable[[Queue, int], None]) -> None:
        """Open a pull. Jobs that wait are delivered at once, also with `wait_s` 0."""
        pull = _Pull(self, queue, batch, on_end)
        if not self._broker.available or queue not in self._broker.open_queues:
            asyncio.get_running_loop().call_soon(on_end, queue, batch)
            return
        self._broker.pulls.setdefault(queue, deque()).append(pull)
        self._broker.serve_pulls(queue)
        if pull.left:
            pull.timer = asyncio.get_running_loop().call_later(wait_s, self._end, pull)

    def _end(self, pull: _Pull) -> None:
        pulls = self._broker.pulls.get(pull.queue, deque())
        if pull in pulls:
            pulls.remove(pull)
            pull.on_end(pull.queue, pull.left)

    async def stop_pulling(self) -> None:
        for pulls in self._broker.pulls.values():
            for pull in [p for p in pulls if p.bus is self]:
                pulls.remove(pull)
                if pull.timer:
                    pull.timer.cancel()
        await asyncio.sleep(0)

    def send_event(self, reply: str, frame: bytes, *, may_wait: bool = False) -> None:  # noqa: ARG002 - no write to join
        """Call the listener in the loop's next turn, in order."""
        asyncio.get_running_loop().call_soon(self._call_listener, reply, frame)

    def _call_listener(self, reply: str, frame: bytes) -> bytes | None:
        listener = self._broker.listeners.get(reply)
        if listener is not None:
            return listener(frame)
        prefix = reply[: reply.rfind(".") + 1]
        return STOP if prefix in self._broker.listeners else None

    def request(self, reply: str, frame: bytes, on_answer: Callable[[bytes | None], None]) -> int:
        self._next += 1
        ticket = self._next
        self._requests[ticket] = on_answer
        asyncio.get_running_loop().call_soon(self._deliver_request, ticket, reply, frame)
        return ticket

    def _deliver_request(self, ticket: int, reply: str, frame: bytes) -> None:
        answer = self._call_listener(reply, frame)
        on_answer = self._requests.pop(ticket, None)
        if on_answer is not None:
            on_answer(answer)

    def cancel_request(self, ticket: int) -> None:
        self._requests.pop(ticket, None)

    async def subscribe_control(self, worker: str, on_control: Callable[[bytes], None]) -> None:

        def on_message(message: bytes) -> bytes | None:
            on_control(message)
            return None

        self._control = f"control.{worker}"
        self._broker.listeners[self._control] = on_message
