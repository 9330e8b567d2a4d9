"""The consumers of the jobs stream: made when a queue is first used, freed when its model is gone and the queue is empty.

A queue is a subject of the jobs stream. A job on a subject without a consumer is stored, and waits; so that a consumer may be
deleted at any moment without losing one. That a job does not wait there for long is ensured three times over:

1. A gateway stores a job only where it knows of a consumer, and looks again once NATS has confirmed the job.
2. NATS tells every gateway which consumer was deleted; each looks whether a job is there, and makes the consumer again.
3. Every second each gateway looks which subjects hold jobs, makes the consumers that are missing, and wakes the workers.
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
from backbone.bus.nats.jetstream import CONSUMER_NOT_FOUND, NANO, ApiError, JobsStreamConfig, request
from backbone.bus.subjects import (
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

MAX_CONSUMERS = 10026
"""JetStream's code for a stream that has as many consumers as it may have."""
TEND_S = 1.0
FREED_PER_ROUND = 200
EVICTED_AT_ONCE = 16
EVICT_IDLE_S = 60.0
"""Where there is no room, a queue that is empty and was not used for this long makes room."""
FULL_S = 10.0
"""Between two tries to make the queue that was refused, where NATS does not say earlier that there is room again: by then another
one may be idle, or the limit a higher one."""
RETRY_AFTER_S = 5.0


class QueueConsumers:
    """What one gateway knows of the consumers, and does with them."""

    def __init__(self, wire: NatsConnection, stream: JobsStreamConfig, ack_wait_s: float) -> None:
        self._wire = wire
        self._stream = stream
        self._ack_wait_s = ack_wait_s
        self.existing: set[bytes] = set()
        """Subjects of the queues that have a consumer. One that is missing here by mistake is made again, which changes nothing."""
        self.on_change: Callable[[QueueChange], None] = lambda _: None
        self._making: dict[bytes, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone_since: dict[Queue, float] = {}
        self._held: set[str] = set()
        """The subjects that held jobs at the last look."""
        self._refused: Queue | None = None
        """The last queue that NATS refused to make; None: there is room, as far as is known."""
        self._try_at = 0.0
        self._full_at = 0
        """How many consumers there were when NATS refused one."""

    async def start(self) -> None:
        """Learn which consumers exist. Raises Unavailable."""
        await self._wire.subscribe(f"{QUEUE_FREED}.*", self._on_deleted)
        await self.reload()
        self._spawn(self._tend())

    async def close(self) -> None:
        """Stop."""
        for task in (*self._tasks, *self._making.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, NexusError):
                await task

    async def reload(self) -> list[Queue]:
        """Ask NATS which queues have a consumer. Raises Unavailable."""
        before = set(self.existing)
        queues = await self._listed()
        found = {_subject(queue) for queue in queues}
        self.existing -= before - found
        self.existing |= found
        return queues

    def refuses(self, queue: Queue) -> bool:
        """Whether the queue has no consumer, and NATS has refused to make one more."""
        return self.full and _subject(queue) not in self.existing

    @property
    def full(self) -> bool:
        """Whether NATS has refused to make one more."""
        return self._refused is not None

    # Make

    async def make(self, queue: Queue) -> None:
        """Make the queue's consumer where it is missing. Raises Unavailable; InvalidRequest for a name that cannot be one."""
        subject = _subject(queue)
        if subject in self.existing:
            return
        task = self._making.get(subject)
        if task is None:
            if self.full:
                self.on_change(QueueChange.REFUSED)
                raise self._refusal()
            task = self._making[subject] = asyncio.create_task(self._make(queue, subject))
            task.add_done_callback(lambda done: self._made(subject, done))
        await asyncio.shield(task)

    def _made(self, subject: bytes, task: asyncio.Task[None]) -> None:
        self._making.pop(subject, None)
        if not task.cancelled():
            task.exception()  # those who wait have it; where nobody does any more, it is not a defect

    async def _make(self, queue: Queue, subject: bytes) -> None:
        try:
            try:
                await self._create(queue)
            except ApiError as error:
                if error.code != MAX_CONSUMERS or not await self._evict():
                    raise
                await self._create(queue)
        except ApiError as error:
            self.on_change(QueueChange.REFUSED)
            if error.code != MAX_CONSUMERS:
                raise Unavailable(f"NATS refuses the queue of the model '{queue.model}': {error}") from error
            self._refused, self._try_at = queue, time.monotonic() + FULL_S
            self._full_at = await self._count()
            log.error("queue.refused", queue=queue, consumers=self._full_at, error=str(error))
            raise self._refusal() from error
        self._refused = None
        self.existing.add(subject)
        self.on_change(QueueChange.MADE)
        log.info("queue.made", queue=queue)

    def _refusal(self) -> Unavailable:
        return Unavailable(
            f"This model has no queue, and NATS refuses to make one more: {self._full_at} consumers exist, and none is idle. "
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
            # NATS would keep a message at `max_deliver` forever, undeliverable: Nexus counts the attempts that were started.
            "max_deliver": -1,
            "max_ack_pending": 100_000,
            "max_waiting": 20_000,
            "deliver_policy": "all",
            "replay_policy": "instant",
            "num_replicas": self._stream.replicas,
        }
        await self._request(
            f"CONSUMER.DURABLE.CREATE.{JOBS_STREAM}.{name}", {"stream_name": JOBS_STREAM, "config": config}
        )

    # Free

    async def free(self, is_served: Callable[[Queue], bool], grace_s: float) -> int:
        """Free the empty queues that `is_served` has denied for `grace_s`, and say how many. Raises Unavailable."""
        now, freed = time.monotonic(), 0
        gone = [queue for queue in await self.reload() if not is_served(queue)]
        since = self._gone_since = {queue: self._gone_since.get(queue, now) for queue in gone}
        for queue in (queue for queue in gone if now - since[queue] >= grace_s):
            if freed == FREED_PER_ROUND:
                break
            if not is_served(queue) and await self._free(queue):
                freed += 1
        return freed

    async def _evict(self) -> bool:
        """Free some idle queues; False where there is none."""
        freed = 0
        async for info in self._infos():
            queue = _parsed(info["name"])
            if queue is not None and _idle_s(info) > EVICT_IDLE_S and await self._free(queue):
                freed += 1
                if freed == EVICTED_AT_ONCE:
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
        except ApiError as error:
            if error.code == CONSUMER_NOT_FOUND:  # another gateway was quicker
                self.existing.discard(_subject(queue))
                return False
            raise Unavailable(f"NATS: {error}") from error
        self.existing.discard(_subject(queue))
        self._gone_since.pop(queue, None)
        self.on_change(QueueChange.FREED)
        log.info("queue.freed", queue=queue)
        await self._restore(queue)
        return True

    def _on_deleted(self, subject: bytes, _reply: bytes, _headers: bytes, _data: bytes) -> None:
        queue = _parsed(subject.rpartition(b".")[2].decode())
        if queue is not None:
            self.existing.discard(_subject(queue))
            self._spawn(self._restore(queue))

    async def _restore(self, queue: Queue) -> None:
        """Make a deleted consumer again where a job came meanwhile."""
        with contextlib.suppress(NexusError, ApiError):  # the next round sees it
            if await self._holding(job_subject(*queue)):
                await self.serve(queue)

    # Tend

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(TEND_S)
            try:
                await self._look()
                await self._try_again()
            except (NexusError, ApiError) as error:
                log.debug("queues not looked after", error=str(error))
            except Exception:
                log.exception("defect in looking after queues")

    async def _look(self) -> None:
        """Every subject that holds a job has a consumer; and workers hear of it: NATS does not say that a job comes again."""
        before, self._held = self._held, set(await self._holding(f"{JOBS}.>"))
        for subject in self._held:
            # A job that was stored a moment ago has woken the workers by itself.
            if subject in before or subject.encode() not in self.existing:
                with contextlib.suppress(ValueError, NexusError):  # the others must not suffer
                    await self.serve(Queue(*parse_job_subject(subject)))

    async def _try_again(self) -> None:
        """Make the queue that was refused, which also frees idle ones. Raises Unavailable where there is still no room."""
        queue, now = self._refused, time.monotonic()
        if queue is None or now < self._try_at:
            return
        self._try_at = now + FULL_S
        await self._make(queue, _subject(queue))

    async def serve(self, queue: Queue) -> None:
        """Make the queue where it is missing, and tell the workers to look at it. Raises Unavailable."""
        missing = _subject(queue) not in self.existing
        await self.make(queue)
        if missing:
            self.on_change(QueueChange.RESTORED)
        self.ring(queue)

    def ring(self, queue: Queue) -> None:
        """Tell the workers to look at a queue."""
        with contextlib.suppress(Unavailable):
            self._wire.publish(_subject(queue).replace(JOBS.encode(), WAKEUPS.encode(), 1), QUEUE_HOLDS_JOBS)

    def missed(self, queue: Queue) -> None:
        """The queue was found to have no consumer."""
        self.existing.discard(_subject(queue))

    # NATS

    async def _holding(self, subject: str) -> list[str]:
        """The subjects that hold jobs; on the way, whether there is room for consumers again."""
        found: dict[str, int] = {}
        while True:
            body = {"subjects_filter": subject, "offset": len(found)}
            info = await self._request(f"STREAM.INFO.{JOBS_STREAM}", body)
            page = info["state"].get("subjects") or {}
            found |= page
            if not page or len(found) >= info.get("total", 0):
                break
        if info["state"].get("consumer_count", 0) < self._full_at:
            self._refused = None
        return list(found)

    async def _count(self) -> int:
        with contextlib.suppress(ApiError, Unavailable):
            return int((await self._request(f"STREAM.INFO.{JOBS_STREAM}"))["state"].get("consumer_count", 0))
        return 0

    async def _listed(self) -> list[Queue]:
        """The queues that have a consumer. Raises Unavailable."""
        names: list[str] = []
        try:
            while True:
                page = await self._request(f"CONSUMER.NAMES.{JOBS_STREAM}", {"offset": len(names)})
                found = page.get("consumers") or []
                names += found
                if not found or len(names) >= page["total"]:
                    break
        except ApiError as error:
            raise Unavailable(f"NATS does not list the queues: {error}") from error
        return [queue for queue in map(_parsed, names) if queue is not None]

    async def _infos(self) -> AsyncIterator[dict[str, Any]]:
        """Yield what NATS says of each consumer; of each page in any order, so that gateways do not all free the same."""
        offset, total = 0, 1
        while offset < total:
            try:
                page = await self._request(f"CONSUMER.LIST.{JOBS_STREAM}", {"offset": offset})
            except ApiError as error:
                raise Unavailable(f"NATS does not list the queues: {error}") from error
            found, total = page.get("consumers") or [], page["total"]
            if not found:
                return
            offset += len(found)
            for info in random.sample(found, len(found)):
                yield info

    async def _request(self, subject: str, body: Any = None) -> dict[str, Any]:
        return await request(self._wire.client, subject, body)

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
    """How long a queue is empty and unused, by NATS's clock; 0 for one that is not empty."""
    if info["num_pending"] or info["num_ack_pending"]:
        return 0.0
    active = info["delivered"].get("last_active") or info["created"]
    return _seconds(info["ts"]) - _seconds(active) if "ts" in info else 0.0


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
