"""The consumers of the jobs stream: created when a queue is first used, deleted when no worker serves its model and it is
empty.

A queue is a subject of the jobs stream. A job on a subject without a consumer is stored and waits, so that a consumer may be
deleted at any moment without losing a job. Three mechanisms keep that wait short:

1. A gateway stores a job only where it knows of a consumer, and checks again once NATS has confirmed the job.
2. NATS tells every gateway which consumer was deleted; each checks for jobs, and creates the consumer again.
3. Every second each gateway lists the subjects that hold jobs, creates missing consumers, and notifies the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import datetime
from typing import Any

import structlog

from backbone.bus.bus import Queue, QueueChange
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.jetstream import NANO, JobsStreamConfig, read_subjects
from backbone.bus.nats.requests import CONSUMER_NOT_FOUND, MAX_CONSUMERS_REACHED, JetStreamError, RequestInbox, call_api
from backbone.bus.subjects import (
    BACKLOG_STREAM,
    JOBS,
    JOBS_STREAM,
    QUEUE_FREED,
    QUEUE_HOLDS_JOBS,
    WAKEUPS,
    consumer_name,
    job_subject,
    parse_consumer_name,
    parse_job_subject,
)
from schemas.errors import NexusError, Unavailable

log = structlog.get_logger(__name__)

CHECK_INTERVAL_S = 1.0
MAX_FREED_PER_ROUND = 200
MAX_EVICTED_AT_ONCE = 16
MIN_EVICTED_IDLE_S = 60.0
"""When NATS allows no more consumers, an empty queue that was unused for this time is deleted."""
REFUSED_RETRY_INTERVAL_S = 10.0
"""Between attempts to create the refused queue, unless NATS reports earlier that it allows more consumers: by then another
queue may be idle, or the limit raised.
"""
RETRY_AFTER_S = 5.0
HELD_UNTIL = "2200-01-01T00:00:00Z"
"""NATS pauses a consumer until a time."""


class QueueConsumers:
    """One gateway's view of the consumers, and its operations on them."""

    def __init__(
        self, connection: NatsConnection, inbox: RequestInbox, stream: JobsStreamConfig, ack_wait_s: float
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._stream = stream
        self._ack_wait_s = ack_wait_s
        self.existing: set[bytes] = set()
        """Subjects of the queues with a consumer. A consumer that is missing here by mistake is created again, which changes
        nothing.
        """
        self.on_change: Callable[[QueueChange], None] = lambda _: None
        self.on_checked: Callable[[dict[str, int]], None] = lambda _: None
        """Called every second with the number of jobs on each subject of the backlogs that holds some."""
        self._is_held: Callable[[str], bool] = lambda _: False
        self._create_tasks: dict[bytes, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unserved_since: dict[Queue, float] = {}
        self._subjects_with_jobs: set[str] = set()
        """The subjects that held jobs at the last check."""
        self._refused: Queue | None = None
        """The last queue that NATS refused; None: NATS allows more queues, as far as is known."""
        self._retry_refused_at = 0.0
        self._consumers_when_refused = 0
        """The number of consumers when NATS refused one."""

    async def start(self) -> None:
        """Read which consumers exist. Raises Unavailable."""
        await self._connection.subscribe(f"{QUEUE_FREED}.*", self._on_deleted)
        await self.reload()
        self._spawn(self._check_forever())

    async def close(self) -> None:
        """Stop the checks."""
        for task in (*self._tasks, *self._create_tasks.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, NexusError):
                await task

    async def reload(self) -> list[Queue]:
        """Read from NATS which queues have a consumer. Raises Unavailable."""
        before = set(self.existing)
        queues = await self._list_queues()
        found = {_subject(queue) for queue in queues}
        self.existing -= before - found
        self.existing |= found
        return queues

    def refuses(self, queue: Queue) -> bool:
        """Return whether the queue has no consumer, and NATS refuses more consumers."""
        return self.full and _subject(queue) not in self.existing

    @property
    def full(self) -> bool:
        """Whether NATS refuses more consumers."""
        return self._refused is not None

    # Create

    async def ensure_consumer(self, queue: Queue) -> None:
        """Create the queue's consumer if it is missing. Raises Unavailable; InvalidRequest for an invalid model name."""
        subject = _subject(queue)
        if subject in self.existing:
            return
        task = self._create_tasks.get(subject)
        if task is None:
            if self.full:
                self.on_change(QueueChange.REFUSED)
                raise self._refusal()
            task = self._create_tasks[subject] = asyncio.create_task(self._create_or_refuse(queue, subject))
            task.add_done_callback(lambda done: self._forget_task(subject, done))
        await asyncio.shield(task)

    def _forget_task(self, subject: bytes, task: asyncio.Task[None]) -> None:
        self._create_tasks.pop(subject, None)
        if not task.cancelled():
            task.exception()  # waiting callers get the error; without any, it is not a defect

    async def _create_or_refuse(self, queue: Queue, subject: bytes) -> None:
        try:
            try:
                await self._create(queue)
            except JetStreamError as error:
                if error.code != MAX_CONSUMERS_REACHED or not await self._evict():
                    raise
                await self._create(queue)
        except JetStreamError as error:
            self.on_change(QueueChange.REFUSED)
            if error.code != MAX_CONSUMERS_REACHED:
                raise Unavailable(f"NATS cannot create the queue of the model '{queue.model}': {error}") from error
            self._refused, self._retry_refused_at = queue, time.monotonic() + REFUSED_RETRY_INTERVAL_S
            self._consumers_when_refused = await self._count()
            log.error("queue.refused", queue=queue, consumers=self._consumers_when_refused, error=str(error))
            raise self._refusal() from error
        self._refused = None
        self.existing.add(subject)
        self.on_change(QueueChange.MADE)
        log.info("queue.created", queue=queue)

    def _refusal(self) -> Unavailable:
        return Unavailable(
            f"This model has no queue, and NATS allows no more queues: {self._consumers_when_refused} consumers exist, and none is idle. "
            "Retry later; operators: raise MAX_QUEUES, or the limit on consumers of the NATS account.",
            code="no_queue",
            retry_after_s=RETRY_AFTER_S,
        )

    async def _create(self, queue: Queue) -> None:
        name = consumer_name(*queue)
        config = {
            "durable_name": name,
            "filter_subject": job_subject(*queue),
            "ack_policy": "explicit",
            "ack_wait": int(self._ack_wait_s * NANO),
            # NATS would keep a message at `max_deliver` forever: Nexus counts started attempts instead.
            "max_deliver": -1,
            "max_ack_pending": 100_000,
            "max_waiting": 20_000,
            "deliver_policy": "all",
            "replay_policy": "instant",
            "num_replicas": self._stream.replicas,
        }
        if self._is_held(queue.model):
            config["pause_until"] = HELD_UNTIL
        await self._request(
            f"CONSUMER.DURABLE.CREATE.{JOBS_STREAM}.{name}", {"stream_name": JOBS_STREAM, "config": config}
        )

    # Hold

    async def apply_holds(self, is_held: Callable[[str], bool]) -> None:
        """Pause the consumers of held models, and resume all others. Raises Unavailable."""
        self._is_held = is_held
        async for info in self._iter_consumer_infos():
            queue = _parsed(info["name"])
            if queue is not None and is_held(queue.model) is not bool(info.get("paused")):
                await self._set_paused(queue, paused=is_held(queue.model))

    async def _set_paused(self, queue: Queue, *, paused: bool) -> None:
        """Let NATS deliver no job of the queue, or deliver them again. Raises Unavailable, also for a server that is too old."""
        body = {"pause_until": HELD_UNTIL} if paused else {}
        try:
            answer = await self._request(f"CONSUMER.PAUSE.{JOBS_STREAM}.{consumer_name(*queue)}", body)
        except JetStreamError as error:
            if error.code == CONSUMER_NOT_FOUND:  # it was empty; it is created held
                return
            raise Unavailable(f"NATS cannot hold or release the queue of the model '{queue.model}': {error}") from error
        if answer.get("paused", False) is not paused:
            raise Unavailable("this nats-server is too old to hold queues: upgrade it to 2.11 or newer")
        log.info("queue.held" if paused else "queue.released", queue=queue)
        if not paused:
            self.notify_workers(queue)

    # Delete

    async def free(self, is_served: Callable[[Queue], bool], grace_s: float) -> int:
        """Delete the empty queues that `is_served` has denied for `grace_s` seconds, and return their number. Raises
        Unavailable.
        """
        now, freed = time.monotonic(), 0
        unserved = [queue for queue in await self.reload() if not is_served(queue)]
        since = self._unserved_since = {queue: self._unserved_since.get(queue, now) for queue in unserved}
        for queue in (queue for queue in unserved if now - since[queue] >= grace_s):
            if freed == MAX_FREED_PER_ROUND:
                break
            if not is_served(queue) and await self._free(queue):
                freed += 1
        return freed

    async def _evict(self) -> bool:
        """Delete some idle queues; False: there is none."""
        freed = 0
        async for info in self._iter_consumer_infos():
            queue = _parsed(info["name"])
            if queue is not None and _idle_s(info) > MIN_EVICTED_IDLE_S and await self._free(queue):
                freed += 1
                if freed == MAX_EVICTED_AT_ONCE:
                    break
        return freed > 0

    async def _free(self, queue: Queue) -> bool:
        """Delete the consumer of an empty queue. A job that is stored meanwhile gets a new one."""
        name = consumer_name(*queue)
        try:
            info = await self._request(f"CONSUMER.INFO.{JOBS_STREAM}.{name}")
            if info["num_pending"] or info["num_ack_pending"]:
                return False
            await self._request(f"CONSUMER.DELETE.{JOBS_STREAM}.{name}")
        except JetStreamError as error:
            if error.code == CONSUMER_NOT_FOUND:  # another gateway deleted it
                self.existing.discard(_subject(queue))
                return False
            raise Unavailable(f"NATS: {error}") from error
        self.existing.discard(_subject(queue))
        self._unserved_since.pop(queue, None)
        self.on_change(QueueChange.FREED)
        log.info("queue.deleted", queue=queue)
        await self._restore(queue)
        return True

    def _on_deleted(self, subject: bytes, _reply: bytes, _headers: bytes, _data: bytes) -> None:
        queue = _parsed(subject.rpartition(b".")[2].decode())
        if queue is not None:
            self.existing.discard(_subject(queue))
            self._spawn(self._restore(queue))

    async def _restore(self, queue: Queue) -> None:
        """Create a deleted consumer again if a job has arrived meanwhile."""
        with contextlib.suppress(NexusError, JetStreamError):  # the next check repeats it
            if await self._list_subjects_with_jobs(job_subject(*queue)):
                await self.serve(queue)

    # Check

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            try:
                await self._check_queues()
                await self._retry_refused()
            except (NexusError, JetStreamError) as error:
                log.debug("queue.check_failed", error=str(error))
            except Exception:
                log.exception("queue.check_crashed")

    async def _check_queues(self) -> None:
        """Create missing consumers of subjects with jobs, and notify the workers: NATS does not, when a job is delivered again."""
        before, self._subjects_with_jobs = (
            self._subjects_with_jobs,
            set(await self._list_subjects_with_jobs(f"{JOBS}.>")),
        )
        for subject in self._subjects_with_jobs:
            # NATS has notified the workers of a job that was stored a moment ago.
            if subject in before or subject.encode() not in self.existing:
                with contextlib.suppress(ValueError, NexusError):  # the other queues must be checked too
                    await self.serve(Queue(*parse_job_subject(subject)))
        self.on_checked(await read_subjects(self._inbox, BACKLOG_STREAM))

    async def _retry_refused(self) -> None:
        """Try to create the refused queue, which also deletes idle ones. Raises Unavailable where NATS still refuses it."""
        queue, now = self._refused, time.monotonic()
        if queue is None or now < self._retry_refused_at:
            return
        self._retry_refused_at = now + REFUSED_RETRY_INTERVAL_S
        await self._create_or_refuse(queue, _subject(queue))

    async def serve(self, queue: Queue) -> None:
        """Create the queue if it is missing, and notify the workers. Raises Unavailable."""
        missing = _subject(queue) not in self.existing
        await self.ensure_consumer(queue)
        if missing:
            self.on_change(QueueChange.RESTORED)
        self.notify_workers(queue)

    def notify_workers(self, queue: Queue) -> None:
        """Notify the workers that a queue holds a job."""
        with contextlib.suppress(Unavailable):
            self._connection.publish(_subject(queue).replace(JOBS.encode(), WAKEUPS.encode(), 1), QUEUE_HOLDS_JOBS)

    def forget(self, queue: Queue) -> None:
        """Record that the queue has no consumer."""
        self.existing.discard(_subject(queue))

    # Requests to NATS

    async def _list_subjects_with_jobs(self, subject: str) -> list[str]:
        """Return the subjects that hold jobs, and update whether NATS allows more consumers again."""
        found: dict[str, int] = {}
        while True:
            body = {"subjects_filter": subject, "offset": len(found)}
            info = await self._request(f"STREAM.INFO.{JOBS_STREAM}", body)
            page = info["state"].get("subjects") or {}
            found |= page
            if not page or len(found) >= info.get("total", 0):
                break
        if info["state"].get("consumer_count", 0) < self._consumers_when_refused:
            self._refused = None
        return list(found)

    async def _count(self) -> int:
        with contextlib.suppress(JetStreamError, Unavailable):
            return int((await self._request(f"STREAM.INFO.{JOBS_STREAM}"))["state"].get("consumer_count", 0))
        return 0

    async def _list_queues(self) -> list[Queue]:
        """Return the queues that have a consumer. Raises Unavailable."""
        names: list[str] = []
        try:
            while True:
                page = await self._request(f"CONSUMER.NAMES.{JOBS_STREAM}", {"offset": len(names)})
                found = page.get("consumers") or []
                names += found
                if not found or len(names) >= page["total"]:
                    break
        except JetStreamError as error:
            raise Unavailable(f"NATS cannot list the queues: {error}") from error
        return [queue for queue in map(_parsed, names) if queue is not None]

    async def _iter_consumer_infos(self) -> AsyncIterator[dict[str, Any]]:
        """Yield NATS's description of each consumer, in random order per page, so that gateways do not all delete the same
        ones.
        """
        offset, total = 0, 1
        while offset < total:
            try:
                page = await self._request(f"CONSUMER.LIST.{JOBS_STREAM}", {"offset": offset})
            except JetStreamError as error:
                raise Unavailable(f"NATS cannot list the queues: {error}") from error
            found, total = page.get("consumers") or [], page["total"]
            if not found:
                return
            offset += len(found)
            for info in random.sample(found, len(found)):
                yield info

    async def _request(self, subject: str, body: Any = None) -> dict[str, Any]:
        return await call_api(self._inbox, subject, body)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _subject(queue: Queue) -> bytes:
    return job_subject(*queue).encode()


def _parsed(name: str) -> Queue | None:
    try:
        return Queue(*parse_consumer_name(name))
    except ValueError:
        return None


def _idle_s(info: dict[str, Any]) -> float:
    """Return how long a queue has been empty and unused, by NATS's clock; 0 for a queue that is not empty."""
    if info["num_pending"] or info["num_ack_pending"]:
        return 0.0
    active = info["delivered"].get("last_active") or info["created"]
    return _seconds(info["ts"]) - _seconds(active) if "ts" in info else 0.0


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
