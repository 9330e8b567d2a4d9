"""Moves jobs from the backlogs into their queues, each owner's in turn. One of the gateways does it for all.

A job is stored in the queue before it is deleted from the backlog, and under the same message id: a gateway that dies in between, or two gateways that believe to be the one, move a job once. Gateways that see a backlog name themselves twice a second; the one
with the least name moves the jobs. The others tell it how long the jobs took that have ended with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import orjson
import structlog

from backbone.bus.bus import Queue
from backbone.bus.nats.backlogs import Backlog, Backlogs
from backbone.bus.nats.connection import NatsConnection, id_headers
from backbone.bus.nats.queue_consumers import QueueConsumers
from backbone.bus.nats.requests import JetStreamError, RequestInbox, store_message
from backbone.bus.nats.stream_reader import StoredMessage, StreamReader
from backbone.bus.subjects import BACKLOG_STREAM, BROADCAST, JOBS_STREAM, backlog_prefix, decode_model
from backbone.ids import new_token
from schemas.errors import NexusError, Unavailable
from schemas.jobs import Capability, Lane

log = structlog.get_logger(__name__)

NOTICES = f"{BROADCAST}.fair"
NOTICE_INTERVAL_S = 0.5
PEER_TIMEOUT_S = 1.6
"""A gateway that has not named itself for this time moves no jobs any more."""
MIN_CHECK_INTERVAL_S = 0.025
MAX_CHECK_INTERVAL_S = 0.2
"""Between looks at a queue of which no notification came: a job of another gateway may have started."""
AHEAD_S = 0.1
"""Fast jobs: as many wait in the queue as start in this time, so that no slot is idle until the next look."""
MIN_COUNTED_S = 0.02
"""Where jobs start less often than this, the queue is measured before each move: a start whose notice comes late would be counted twice."""
MAX_AHEAD = 16
"""At most so many jobs for each slot wait in the queue."""
RETRY_DELAY_S = 0.5
MAX_MOVED_AT_ONCE = 256
MAX_REPORTED_OWNERS = 1000

CONFIRM_TO = b"Nexus-Confirm"
"""Header of a synchronous job in the backlog: where its gateway learns that the job was moved."""
OnMoved = Callable[[str, int, str, int], None]
"""(job, run, owner, sequence): a durable job has a new sequence."""


def backlog_headers(message_id: bytes, confirm_to: bytes) -> bytes:
    """Return the headers of a synchronous job in the backlog."""
    return b"NATS/1.0\r\nNats-Msg-Id: %b\r\nNexus-Confirm: %b\r\n\r\n" % (message_id, confirm_to)


@dataclass(slots=True)
class _QueueCount:
    """How many jobs wait in a queue, as far as is known."""

    waiting: int = 0
    measured_at: float = 0.0


class BacklogReleaser:
    """Moves jobs while this gateway is the one that does, and reports what jobs took."""

    def __init__(
        self,
        connection: NatsConnection,
        inbox: RequestInbox,
        consumers: QueueConsumers,
        backlogs: Backlogs,
        *,
        replicated: bool,
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._consumers = consumers
        self._backlogs = backlogs
        self._jobs = StreamReader(inbox, BACKLOG_STREAM, replicated=replicated)
        self._name = new_token()
        self._peers: dict[str, float] = {}
        """When each other gateway named itself last."""
        self._used: dict[tuple[Queue, str], list[float]] = {}
        """What jobs took that ended here, and was not reported yet."""
        self._tasks: dict[bytes, asyncio.Task[None]] = {}
        self._moved: set[int] = set()
        """Sequences in the backlog of jobs that were moved, until they are deleted there."""
        self._notice_task: asyncio.Task[None] | None = None
        self._has_backlog = asyncio.Event()
        self.on_moved: OnMoved = lambda *_: None

    async def start(self) -> None:
        """Listen to the other gateways, and move jobs whenever some wait. Raises Unavailable."""
        if not self._backlogs.enabled:
            return
        self._backlogs.attach(self._inbox)
        self._backlogs.on_wait = self._on_wait
        await self._connection.subscribe(NOTICES, self._on_notice)
        self._notice_task = asyncio.create_task(self._send_notices())

    async def close(self) -> None:
        """Stop, and leave the work to the other gateways. Jobs that are being moved stay in the backlog or are in the queue."""
        if self._has_backlog.is_set():
            self._send_notice(leaves=True)
        for task in (self._notice_task, *self._tasks.values()):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    @property
    def is_elected(self) -> bool:
        """Whether this gateway moves the jobs."""
        oldest = time.monotonic() - PEER_TIMEOUT_S
        return all(name > self._name or seen_at < oldest for name, seen_at in self._peers.items())

    def record_use(self, queue: Queue, owner: str, seconds: float) -> None:
        """Note that a job has held a slot for so long. `owner`: its token."""
        backlog = self._backlogs.of(queue)
        if not backlog.order.total:
            return
        backlog.order.record_use(owner, seconds)
        if (queue, owner) in self._used or len(self._used) < MAX_REPORTED_OWNERS:
            self._used.setdefault((queue, owner), []).append(seconds)

    # Election

    def _on_wait(self, backlog: Backlog) -> None:
        self._has_backlog.set()
        backlog.wake.set()
        task = self._tasks.get(backlog.subject)
        if task is None:
            task = self._tasks[backlog.subject] = asyncio.create_task(self._move_jobs(backlog))
            task.add_done_callback(lambda _: self._tasks.pop(backlog.subject, None))

    async def _send_notices(self) -> None:
        while True:
            await self._has_backlog.wait()
            self._send_notice()
            await asyncio.sleep(NOTICE_INTERVAL_S)
            if not self._backlogs.all_holding():
                self._has_backlog.clear()

    def _send_notice(self, *, leaves: bool = False) -> None:
        used, self._used = self._used, {}
        report = [(*queue, owner, seconds) for (queue, owner), seconds in used.items()]
        notice = {"gateway": self._name, "used": report, "leaves": leaves}
        with contextlib.suppress(Unavailable):
            self._connection.publish(NOTICES.encode(), orjson.dumps(notice))

    def _on_notice(self, _subject: bytes, _reply: bytes, _headers: bytes, data: bytes) -> None:
        try:
            notice = orjson.loads(data)
            name = str(notice["gateway"])
            if name == self._name:
                return
            oldest = time.monotonic() - PEER_TIMEOUT_S
            self._peers = {peer: seen_at for peer, seen_at in self._peers.items() if seen_at >= oldest}
            self._peers[name] = time.monotonic()
            if notice["leaves"]:
                del self._peers[name]
            for capability, lane, model, owner, seconds in notice["used"]:
                order = self._backlogs.of(Queue(Capability(capability), Lane(lane), model)).order
                for one in seconds:
                    order.record_use(owner, float(one))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("fair.notice_unreadable", error=str(error))

    # Moving

    async def _move_jobs(self, backlog: Backlog) -> None:
        """Move the jobs of one backlog until it is empty."""
        count, wait_s = _QueueCount(), MIN_CHECK_INTERVAL_S
        while backlog.order.total:
            backlog.wake.clear()
            moved = 0
            try:
                if self.is_elected:
                    moved = await self._fill_queue(backlog, count)
            except (NexusError, JetStreamError) as error:
                log.debug("fair.move_failed", queue=backlog.queue, error=str(error))
                await asyncio.sleep(RETRY_DELAY_S)
            except Exception:
                log.exception("fair.move_crashed", queue=backlog.queue)
                await asyncio.sleep(RETRY_DELAY_S)
            wait_s = MIN_CHECK_INTERVAL_S if moved else min(2 * wait_s, MAX_CHECK_INTERVAL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await backlog.wake.wait()

    async def _fill_queue(self, backlog: Backlog, count: _QueueCount) -> int:
        """Move as many jobs as the queue has room for, and return their number. Raises Unavailable."""
        await self._consumers.ensure_consumer(backlog.queue)
        target = self._count_wanted(backlog)
        room = min(target - await self._count_waiting(backlog, count), MAX_MOVED_AT_ONCE)
        turns = [owner for _ in range(room) if (owner := backlog.order.take()) is not None]
        if not turns:
            return 0
        heads = await self._read_heads(backlog, Counter(turns))
        jobs = [heads[owner].popleft() for owner in turns if heads[owner]]
        await asyncio.gather(*(self._move(backlog, job) for job in jobs))
        count.waiting += len(jobs)
        return len(jobs)

    def _count_wanted(self, backlog: Backlog) -> int:
        """Return how many jobs are to wait in the queue: one for each slot, or as many as start in AHEAD_S."""
        slots, seconds = self._backlogs.slots(backlog.queue), backlog.order.mean_seconds
        return slots if seconds is None else max(slots, round(slots * AHEAD_S / max(seconds, AHEAD_S / MAX_AHEAD)))

    async def _count_waiting(self, backlog: Backlog, count: _QueueCount) -> int:
        """Return how many jobs wait in the queue. Where jobs start often: those of the last measurement, without those that have started since."""
        started, backlog.started = backlog.started, 0
        now = time.monotonic()
        interval_s = (backlog.order.mean_seconds or 0.0) / self._backlogs.slots(backlog.queue)
        if started and interval_s < MIN_COUNTED_S and now < count.measured_at + MAX_CHECK_INTERVAL_S:
            count.waiting = max(0, count.waiting - started)
        else:
            count.waiting, count.measured_at = await self._backlogs.count_waiting(backlog.queue), now
        return count.waiting

    async def _read_heads(self, backlog: Backlog, wanted: Counter[str]) -> dict[str, deque[StoredMessage]]:
        found = await asyncio.gather(*(self._read_head(backlog, owner, count) for owner, count in wanted.items()))
        return dict(zip(wanted, found, strict=True))

    async def _read_head(self, backlog: Backlog, owner: str, count: int) -> deque[StoredMessage]:
        """Read the oldest jobs of an owner, and correct how many wait: callers disconnect, and jobs are cancelled."""
        subject = f"{backlog_prefix(*backlog.queue)}.{owner}"
        messages, left = await self._jobs.batch(1, subject, count + len(self._moved))
        jobs = deque(message for message in messages if message.seq not in self._moved)
        for message in messages:
            if message.seq in self._moved:  # an earlier attempt to delete it failed
                await self._delete(message.seq)
        extra = max(0, len(jobs) - count)
        for _ in range(extra):
            jobs.pop()
        for _ in range(count - len(jobs)):
            backlog.order.refund(owner)
        if len(jobs) < count or left is not None:
            backlog.order.set_waiting(owner, (left or 0) + extra)
        return jobs

    async def _move(self, backlog: Backlog, job: StoredMessage) -> None:
        """Store the job in the queue, tell its gateway, and delete it from the backlog. Raises Unavailable, QueueFull."""
        message_id = job.header(b"Nats-Msg-Id") or b""
        stored = await store_message(self._inbox, backlog.subject, job.data, id_headers(message_id))
        self._moved.add(job.seq)
        confirm_to = job.header(CONFIRM_TO)
        if confirm_to is not None:
            self._connection.publish(
                confirm_to, orjson.dumps({"stream": JOBS_STREAM, "seq": stored.seq, "moved": True})
            )
        else:
            owner = decode_model(job.subject.rpartition(".")[2])
            name, run = message_id.decode().split(".")[:2]
            self.on_moved(name, int(run), owner, stored.seq)
        await self._delete(job.seq)

    async def _delete(self, seq: int) -> None:
        """Delete a job that was moved. Raises Unavailable."""
        await self._jobs.delete(seq)
        self._moved.discard(seq)
