"""The bus in memory, for fast tests: the same guarantees as NATS's, within one event loop."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from backbone.bus.bus import MAX_FRESH_AGE_S, JobDelivery, Queue, QueueDepth, ReplyListener, StorageUsage, StreamUsage
from backbone.bus.subjects import JOBS_STREAM, encode_model
from backbone.clock import now
from backbone.testing.job_log_state import JobLogState
from schemas.errors import QueueFull, RequestTooLarge, Unavailable
from schemas.frames import STOP
from schemas.jobs import Envelope

MAX_MESSAGE = 8 * 1024 * 1024


@dataclass(slots=True)
class _Job:
    """A stored message."""

    seq: int
    queue: Queue
    message: bytes
    stored_at: float
    """By the loop's clock."""
    deliveries: int = 0
    owner: asyncio.TimerHandle | None = None
    """Fires when whoever has the job has held it for `ack_wait`."""


@dataclass(slots=True)
class _Pull:
    """An open pull."""

    bus: MemoryWorkerBus
    queue: Queue
    left: int
    on_end: Callable[[Queue, int], None]
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class MemoryBroker:
    """What NATS is to the real implementation. `available = False` makes every call fail as without NATS."""

    ack_wait_s: float = 15.0
    max_per_queue: int = 10_000
    away: bool = False
    jobs: dict[int, _Job] = field(default_factory=dict)
    waiting: dict[Queue, deque[_Job]] = field(default_factory=dict)
    pulls: dict[Queue, deque[_Pull]] = field(default_factory=dict)
    max_queues: int = 12_000
    open_queues: set[Queue] = field(default_factory=set)
    listeners: dict[str, Callable[[bytes], bytes | None]] = field(default_factory=dict)
    """Prefix of reply subjects, or control subject, to who hears it."""
    workers: list[MemoryWorkerBus] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    last_seq: int = 0
    records: JobLogState = field(default_factory=JobLogState)
    """What is stored about durable jobs."""

    @property
    def available(self) -> bool:
        """Set it to make the broker go away and come back."""
        return not self.away

    @available.setter
    def available(self, value: bool) -> None:
        self.away = not value
        self.records.changed(value)

    def require(self) -> None:
        """Raise Unavailable while the broker is away."""
        if not self.available:
            raise Unavailable("the memory broker is away")

    def store(self, queue: Queue, message: bytes, message_id: str) -> int:
        """Keep a job, once per `message_id`. Raises QueueFull."""
        if message_id in self.seen:
            return self.seen[message_id]
        if sum(job.queue == queue for job in self.jobs.values()) >= self.max_per_queue:
            raise QueueFull
        self.last_seq += 1
        job = _Job(self.last_seq, queue, message, asyncio.get_running_loop().time())
        self.jobs[job.seq] = job
        self.seen[message_id] = job.seq
        self.waiting.setdefault(queue, deque()).append(job)
        for worker in list(self.workers):
            worker.ring(queue)
        self.serve_pulls(queue)
        return job.seq

    def open_queue(self, queue: Queue) -> None:
        """Make a queue where it is not there. Raises Unavailable where there are as many as there may be."""
        encode_model(queue.model)
        if queue not in self.open_queues and len(self.open_queues) >= self.max_queues:
            raise Unavailable("this model has no queue, and there is no room for one more", code="no_queue")
        self.open_queues.add(queue)
        self.serve_pulls(queue)

    def holds(self, queue: Queue) -> bool:
        """Whether a job is in this queue, or comes from it and is in somebody's hands."""
        return any(job.queue == queue for job in self.jobs.values())

    def serve_pulls(self, queue: Queue) -> None:
        """Hand waiting jobs to open pulls, in turn."""
        waiting, pulls = self.waiting.get(queue, deque()), self.pulls.get(queue, deque())
        while waiting and pulls and queue in self.open_queues:
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
        self.hold(job)
        asyncio.get_running_loop().call_soon(bus.on_job, delivery)

    def hold(self, job: _Job) -> None:
        """The job is somebody's for `ack_wait_s` from now."""
        if job.owner:
            job.owner.cancel()
        job.owner = asyncio.get_running_loop().call_later(self.ack_wait_s, self.put_back, job)

    def put_back(self, job: _Job) -> None:
        """The job waits again, at the head of its queue."""
        if job.owner:
            job.owner.cancel()
            job.owner = None
        if job.seq in self.jobs:
            self.waiting.setdefault(job.queue, deque()).appendleft(job)
            self.serve_pulls(job.queue)

    def forget(self, seq: int) -> None:
        """The job is gone."""
        job = self.jobs.pop(seq, None)
        if job is None:
            return
        if job.owner:
            job.owner.cancel()
        waiting = self.waiting.get(job.queue)
        if waiting and job in waiting:
            waiting.remove(job)


class MemoryDelivery:
    """See backbone.bus.bus.JobDelivery."""

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
        """Nobody has taken it from us."""
        return not self._settled and self._job.owner is not None and self._job.deliveries == self.delivery

    def ack(self) -> None:
        """Forget the job."""
        if self.owned:
            self._broker.forget(self._job.seq)
        self._settled = True

    def nak(self, delay_s: float = 0.0) -> None:
        """Put it back."""
        if self.owned:
            if delay_s:
                asyncio.get_running_loop().call_later(delay_s, self._broker.put_back, self._job)
            else:
                self._broker.put_back(self._job)
        self._settled = True

    def extend(self) -> None:
        """Hold it longer."""
        if self.owned:
            self._broker.hold(self._job)


class MemoryGatewayBus:
    """See backbone.bus.bus.GatewayBus."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._prefix = f"reply.{secrets.token_hex(4)}."
        self._listeners: dict[str, ReplyListener] = {}
        self._gone_since: dict[Queue, float] = {}

    async def start(self) -> None:
        """Listen."""
        self._broker.require()
        self._broker.listeners[self._prefix] = lambda _: None

    async def close(self) -> None:
        """Listen no more."""
        self._broker.listeners.pop(self._prefix, None)
        for reply in list(self._listeners):
            self._broker.listeners.pop(reply, None)

    @property
    def connected(self) -> bool:
        """Whether the broker is there."""
        return self._broker.available

    @property
    def max_message_bytes(self) -> int:
        """A bound like NATS's."""
        return MAX_MESSAGE

    async def open_queue(self, queue: Queue) -> None:
        """Jobs of this queue may be pulled."""
        self._broker.require()
        self._broker.open_queue(queue)

    async def free_queues(self, is_served: Callable[[Queue], bool], grace_s: float) -> int:
        """Forget queues."""
        self._broker.require()
        now, broker = asyncio.get_running_loop().time(), self._broker
        gone = [queue for queue in broker.open_queues if not is_served(queue)]
        self._gone_since = {queue: self._gone_since.get(queue, now) for queue in gone}
        over = {queue for queue in gone if now - self._gone_since[queue] >= grace_s and not broker.holds(queue)}
        broker.open_queues -= over
        return len(over)

    def is_queue_refused(self, queue: Queue) -> bool:
        """Whether there is no room for it."""
        return self.queues_are_full and queue not in self._broker.open_queues

    @property
    def queues_are_full(self) -> bool:
        """Whether there is no room for one more."""
        return self.queue_count >= self._broker.max_queues

    @property
    def queue_count(self) -> int:
        """How many there are."""
        return len(self._broker.open_queues)

    def new_reply_subject(self) -> str:
        """A fresh address."""
        return self._prefix + secrets.token_hex(16)

    def submit(self, envelope: Envelope, body: bytes, listener: ReplyListener) -> None:
        """Store, and tell the sink in the loop's next turn."""
        self._broker.require()
        if len(body) > MAX_MESSAGE:
            raise RequestTooLarge
        encode_model(envelope.model)
        self._listeners[envelope.reply] = listener
        self._broker.listeners[envelope.reply] = listener.on_event
        asyncio.get_running_loop().call_soon(self._store, envelope, body, listener)

    def _store(self, envelope: Envelope, body: bytes, listener: ReplyListener) -> None:
        queue = Queue(envelope.capability, envelope.lane, envelope.model)
        try:
            self._broker.open_queue(queue)
            seq = self._broker.store(queue, envelope.encode(body), f"{envelope.job}.{envelope.run}")
        except (QueueFull, Unavailable) as error:
            listener.on_refused(error)
            return
        listener.on_stored(seq)

    def release(self, reply: str) -> None:
        """Questions from now on are answered GONE."""
        self._listeners.pop(reply, None)
        self._broker.listeners.pop(reply, None)

    def delete_job(self, seq: int) -> None:
        """Forget a job."""
        self._broker.forget(seq)

    def send_control(self, worker: str, message: bytes) -> None:
        """Tell a worker."""
        listener = self._broker.listeners.get(f"control.{worker}")
        if listener is not None:
            asyncio.get_running_loop().call_soon(listener, message)

    async def queue_depths(self) -> list[QueueDepth]:
        """Count."""
        self._broker.require()
        counts: dict[Queue, list[int]] = {}
        for job in self._broker.jobs.values():
            counts.setdefault(job.queue, [0, 0])[job.owner is not None] += 1
        return [QueueDepth(queue, waiting, running) for queue, (waiting, running) in counts.items()]

    async def server_time_s(self) -> float:
        """This process's."""
        self._broker.require()
        return now()

    async def storage_usage(self) -> StorageUsage:
        """Jobs are all there is."""
        self._broker.require()
        jobs = self._broker.jobs.values()
        return StorageUsage((StreamUsage(JOBS_STREAM, len(jobs), sum(len(job.message) for job in jobs), None),), 0)

    async def ping(self) -> None:
        """Whether the broker is there."""
        self._broker.require()


class MemoryWorkerBus:
    """See backbone.bus.bus.WorkerBus."""

    def __init__(self, broker: MemoryBroker, on_job: Callable[[JobDelivery], None]) -> None:
        self._broker = broker
        self.on_job = on_job
        self._queues: set[Queue] = set()
        self._muted: set[Queue] = set()
        self._on_wakeup: Callable[[Queue], None] | None = None
        self._on_recheck: Callable[[Queue], None] | None = None
        self._questions: dict[int, Callable[[bytes | None], None]] = {}
        self._next = 0
        self._control: str | None = None

    async def start(self) -> None:
        """Be rung."""
        self._broker.require()
        self._broker.workers.append(self)

    async def close(self) -> None:
        """Be rung no more."""
        await self.stop_pulling()
        if self in self._broker.workers:
            self._broker.workers.remove(self)
        if self._control:
            self._broker.listeners.pop(self._control, None)

    @property
    def connected(self) -> bool:
        """Whether the broker is there."""
        return self._broker.available

    async def ping(self) -> None:
        """Whether the broker is there."""
        self._broker.require()

    async def serve(
        self,
        queues: list[Queue],
        on_wakeup: Callable[[Queue], None] | None,
        on_recheck: Callable[[Queue], None] | None = None,
    ) -> None:
        """Pull from these."""
        self._queues = set(queues)
        self._muted &= self._queues
        self._on_wakeup = on_wakeup
        self._on_recheck = on_recheck

    async def set_muted(self, queue: Queue, *, muted: bool) -> None:
        """Be rung for it, or not."""
        (self._muted.add if muted else self._muted.discard)(queue)

    def ring(self, queue: Queue) -> None:
        """A job was stored."""
        if self._on_wakeup is not None and queue in self._queues - self._muted:
            asyncio.get_running_loop().call_soon(self._on_wakeup, queue)

    def pull(self, queue: Queue, batch: int, wait_s: float, on_end: Callable[[Queue, int], None]) -> None:
        """Open a pull; it is served before it is found to be too early."""
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
        """Take all pulls away; jobs on their way arrive in the loop's next turn."""
        for pulls in self._broker.pulls.values():
            for pull in [p for p in pulls if p.bus is self]:
                pulls.remove(pull)
                if pull.timer:
                    pull.timer.cancel()
        await asyncio.sleep(0)

    def send_event(self, reply: str, frame: bytes) -> None:
        """Tell the sink in the loop's next turn, in order."""
        asyncio.get_running_loop().call_soon(self._tell, reply, frame)

    def _tell(self, reply: str, frame: bytes) -> bytes | None:
        listener = self._broker.listeners.get(reply)
        if listener is not None:
            return listener(frame)
        prefix = reply[: reply.rfind(".") + 1]
        return STOP if prefix in self._broker.listeners else None

    def request(self, reply: str, frame: bytes, on_answer: Callable[[bytes | None], None]) -> int:
        """Tell the sink, and bring its answer."""
        self._next += 1
        ticket = self._next
        self._questions[ticket] = on_answer
        asyncio.get_running_loop().call_soon(self._put_question, ticket, reply, frame)
        return ticket

    def _put_question(self, ticket: int, reply: str, frame: bytes) -> None:
        answer = self._tell(reply, frame)
        on_answer = self._questions.pop(ticket, None)
        if on_answer is not None:
            on_answer(answer)

    def cancel_request(self, ticket: int) -> None:
        """Forget a question."""
        self._questions.pop(ticket, None)

    async def subscribe_control(self, worker: str, on_control: Callable[[bytes], None]) -> None:
        """Hear control messages."""

        def heard(message: bytes) -> bytes | None:
            on_control(message)
            return None

        self._control = f"control.{worker}"
        self._broker.listeners[self._control] = heard
