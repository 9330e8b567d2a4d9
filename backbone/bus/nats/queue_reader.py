"""Reads the waiting jobs of a model in the order in which they will start, a page at a time."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable
from itertools import islice

from backbone.bus.bus import Queue, QueueDepth
from backbone.bus.nats.backlogs import Backlogs
from backbone.bus.nats.jetstream import read_depths
from backbone.bus.nats.requests import RequestInbox
from backbone.bus.nats.stream_reader import StoredMessage, StreamReader
from backbone.bus.queue_listing import PageCursor, QueueCursor, QueuedJob, QueuePage, lane_order, parse_queued_job
from backbone.bus.subjects import (
    BACKLOG,
    BACKLOG_STREAM,
    JOBS,
    JOBS_STREAM,
    backlog_prefix,
    encode_model,
    job_subject,
    stream_of_job,
)

MAX_RUNNING = 100
MAX_QUEUE_BYTES = 4 * 1024 * 1024
"""Bytes of messages that a page reads of one queue: jobs are read with their bodies. A page with larger ones is shorter."""


class QueueReader:
    """Reads pages of one model's queues."""

    def __init__(self, inbox: RequestInbox, backlogs: Backlogs, *, replicated: bool) -> None:
        self._inbox = inbox
        self._backlogs = backlogs
        self._jobs = StreamReader(inbox, JOBS_STREAM, replicated=replicated)
        self._backlog_reader = StreamReader(inbox, BACKLOG_STREAM, replicated=replicated)

    async def page(self, model: str, after: str, limit: int) -> QueuePage:
        """Return up to `limit` jobs after the cursor `after` (empty: the first ones). Raises Unavailable; ValueError for another cursor."""
        cursor = PageCursor.decode(after, model) if after else PageCursor()
        token = encode_model(model)
        depths = await read_depths(
            self._inbox, lambda _: None, jobs=f"{JOBS}.*.*.{token}", backlogs=f"{BACKLOG}.*.*.{token}.*"
        )
        readers = [_OneQueue(self, depth, cursor.queues.get(depth.queue, QueueCursor())) for depth in depths]
        await asyncio.gather(*(reader.measure() for reader in readers))
        left = {reader.queue: reader.left for reader in readers}
        passed = {queue: one.passed_over for queue, one in cursor.queues.items()}
        order = list(islice(lane_order(left, passed), limit))
        wanted = Counter(order)
        running = [] if after else await self._running(depths)
        await asyncio.gather(*(reader.read(wanted[reader.queue]) for reader in readers if wanted[reader.queue]))
        found, is_short = _take(order, {reader.queue: reader for reader in readers})
        first = cursor.position
        cursor.advance(found, left)
        has_more = is_short or sum(left.values()) > len(order)
        return QueuePage(
            first,
            found,
            running,
            sum(depth.waiting for depth in depths),
            cursor.encode() if has_more else None,
            has_more,
        )

    async def _running(self, depths: Iterable[QueueDepth]) -> list[QueuedJob]:
        """Return the jobs that workers hold: those before the next one of each queue."""
        found = await asyncio.gather(
            *(
                self._jobs.batch(1, job_subject(*depth.queue), min(MAX_RUNNING, depth.in_progress))
                for depth in depths
                if depth.in_progress
            )
        )
        queues = [depth for depth in depths if depth.in_progress]
        jobs = [
            _parse(depth.queue, message)
            for depth, (messages, _) in zip(queues, found, strict=True)
            for message in messages
            if message.seq < depth.next_seq
        ]
        return [job for job in jobs if job is not None][:MAX_RUNNING]


class _OneQueue:
    """Reads one queue from a cursor on: first what waits in the queue itself, then the backlogs by their owners' turns."""

    def __init__(self, reader: QueueReader, depth: QueueDepth, cursor: QueueCursor) -> None:
        self._reader = reader
        self._depth = depth
        self._cursor = cursor
        self.queue = depth.queue
        self._subject = job_subject(*depth.queue)
        self._direct = 0
        self._counts: dict[str, int] = {}
        """Jobs of each owner that are left in the backlog."""
        self._skipped: dict[str, int] = {}
        """Jobs of each owner that wait before them."""
        self.jobs: deque[QueuedJob] = deque()
        self.is_short = False

    @property
    def left(self) -> int:
        """The number of jobs behind the cursor."""
        return self._direct + sum(self._counts.values())

    async def measure(self) -> None:
        """Count the jobs behind the cursor."""
        reader, depth = self._reader, self._depth
        self._direct = depth.waiting - depth.backlogged
        if self._direct and self._cursor.seq >= depth.next_seq:
            self._direct = await _count_from(reader._jobs, self._cursor.seq + 1, self._subject, self._direct)
        if not depth.backlogged:
            return
        prefix = f"{backlog_prefix(*self.queue)}."
        state = await reader._backlog_reader.state(f"{prefix}*")
        counts: dict[str, int] = {name.removeprefix(prefix): n for name, n in (state.get("subjects") or {}).items()}
        seen = {owner: seq for owner, seq in self._cursor.owners.items() if owner in counts}
        left = await asyncio.gather(
            *(
                _count_from(reader._backlog_reader, seq + 1, prefix + owner, counts[owner])
                for owner, seq in seen.items()
            )
        )
        self._counts = counts | dict(zip(seen, left, strict=True))
        self._skipped = {owner: counts[owner] - self._counts[owner] for owner in seen}

    async def read(self, count: int) -> None:
        """Read the next `count` jobs."""
        reader, cursor = self._reader, self._cursor
        direct = min(count, self._direct)
        if direct:
            first = max(cursor.seq + 1, self._depth.next_seq)
            self._add(await self._batches(reader._jobs, first, self._subject, direct), direct)
        if count <= direct or self.is_short:
            return
        order = reader._backlogs.of(self.queue).order.upcoming(self._counts, self._skipped)
        owners = list(islice(order, count - direct))
        wanted, prefix = Counter(owners), f"{backlog_prefix(*self.queue)}."
        found = await asyncio.gather(
            *(
                self._batches(reader._backlog_reader, cursor.owners.get(owner, 0) + 1, prefix + owner, number)
                for owner, number in wanted.items()
            )
        )
        by_owner = {owner: deque(messages) for owner, messages in zip(wanted, found, strict=True)}
        in_order: list[StoredMessage] = []
        for owner in owners:
            if not by_owner[owner]:
                break  # too large for this page, or gone meanwhile
            in_order.append(by_owner[owner].popleft())
        self._add(in_order, len(owners))

    def _add(self, messages: list[StoredMessage], wanted: int) -> None:
        self.is_short |= len(messages) < wanted
        self.jobs.extend(job for message in messages if (job := _parse(self.queue, message)) is not None)

    async def _batches(self, stream: StreamReader, seq: int, subject: str, count: int) -> list[StoredMessage]:
        found: list[StoredMessage] = []
        while len(found) < count and sum(len(message.data) for message in found) < MAX_QUEUE_BYTES:
            messages, _ = await stream.batch(found[-1].seq + 1 if found else seq, subject, count - len(found))
            if not messages:
                break
            found += messages
        return found


async def _count_from(stream: StreamReader, seq: int, subject: str, otherwise: int) -> int:
    """Return how many messages a subject has from `seq` on; `otherwise` where the stream does not say."""
    messages, left = await stream.batch(seq, subject, 1)
    return 0 if not messages else otherwise if left is None else left + 1


def _take(order: list[Queue], readers: dict[Queue, _OneQueue]) -> tuple[list[QueuedJob], bool]:
    """Return the jobs in order, up to the first that was not read, and whether there was one."""
    found: list[QueuedJob] = []
    for queue in order:
        reader = readers[queue]
        if reader.jobs:
            found.append(reader.jobs.popleft())
        elif reader.is_short:
            return found, True
    return found, False


def _parse(queue: Queue, message: StoredMessage) -> QueuedJob | None:
    is_backlogged = stream_of_job(message.seq) == BACKLOG_STREAM
    backlog = message.subject.rpartition(".")[2] if is_backlogged else ""
    return parse_queued_job(queue, message.seq, message.data, message.stored_at, backlog)
