"""What waits in the queues of one model, in the order in which it will start. The order of lanes is pure: no clock, no bus."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from backbone.bus.bus import Queue
from schemas.jobs import LANES, Capability, Lane

PASSED_OVER_LIMIT = 8
"""A waiting lane is served after so many jobs of higher lanes, as workers do (`workers.queue_selector`)."""
MAX_CURSOR_OWNERS = 500
"""Owners of a page's jobs, and of all pages before it, that a cursor can hold."""
LANE_RANK = {lane: rank for rank, lane in enumerate(LANES)}


class QueuedJob(NamedTuple):
    """A job in a queue, as its message says."""

    queue: Queue
    seq: int
    job: str
    run: int
    owner: str
    endpoint: str
    public_model: str
    is_durable: bool
    batch: str
    stored_at: int
    """Unix seconds, by NATS's clock."""
    size: int
    """Bytes of the request's body."""
    backlog: str = ""
    """The owner's token, for a job in the owner's backlog; empty: the job is in the queue itself."""


@dataclass(frozen=True, slots=True)
class QueuePage:
    """A page of waiting jobs, and the jobs that workers hold."""

    first_position: int
    """The number of jobs on the pages before."""
    waiting: list[QueuedJob]
    running: list[QueuedJob]
    """On the first page only; at most 100."""
    total: int
    """The number of waiting jobs of the model."""
    next_cursor: str | None
    has_more: bool


@dataclass(slots=True)
class QueueCursor:
    """Where a page ends in one queue."""

    passed_over: int = 0
    """Jobs of other queues since the last one of this."""
    seq: int = 0
    """The last job of the queue itself."""
    owners: dict[str, int] = field(default_factory=dict)
    """The last job of each owner in the backlog, by the owner's token."""


@dataclass(slots=True)
class PageCursor:
    """Where a page ends."""

    position: int = 0
    queues: dict[Queue, QueueCursor] = field(default_factory=dict)

    def advance(self, jobs: Iterable[QueuedJob], queues: Iterable[Queue]) -> None:
        """Move behind these jobs. `queues`: all in which jobs wait."""
        for queue in queues:
            self.queues.setdefault(queue, QueueCursor())
        for job in jobs:
            self.position += 1
            for queue, one in self.queues.items():
                one.passed_over = 0 if queue == job.queue else one.passed_over + 1
            if job.backlog:
                self.queues[job.queue].owners[job.backlog] = job.seq
            else:
                self.queues[job.queue].seq = job.seq

    def encode(self) -> str | None:
        """Return the cursor as text; None: it would be too long."""
        if sum(len(one.owners) for one in self.queues.values()) > MAX_CURSOR_OWNERS:
            return None
        queues = [[q.capability.value, q.lane.value, c.passed_over, c.seq, c.owners] for q, c in self.queues.items()]
        return base64.urlsafe_b64encode(orjson.dumps([self.position, queues])).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str, model: str) -> PageCursor:
        """Return the cursor of `encode`. Raises ValueError."""
        try:
            position, queues = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
            cursor = cls(max(0, int(position)))
            for capability, lane, passed_over, seq, owners in queues:
                queue = Queue(Capability(capability), Lane(lane), model)
                seqs = {str(owner): int(last) for owner, last in owners.items()}
                cursor.queues[queue] = QueueCursor(int(passed_over), int(seq), seqs)
        except (ValueError, TypeError, AttributeError, binascii.Error) as error:
            raise ValueError("not a cursor of a queue") from error
        return cursor


def lane_order(counts: Mapping[Queue, int], passed_over: Mapping[Queue, int]) -> Iterator[Queue]:
    """Yield the queue of each job that starts next: the highest lane, and a lower one after `PASSED_OVER_LIMIT` jobs.

    `counts`: how many jobs wait in each queue. `passed_over`: how many jobs of others have started since the last one of each.
    """
    left = {queue: count for queue, count in counts.items() if count > 0}
    passed = {queue: passed_over.get(queue, 0) for queue in left}
    while left:
        due = [queue for queue in left if passed[queue] >= PASSED_OVER_LIMIT]
        queue = max(due, key=passed.__getitem__) if due else min(left, key=_rank)
        yield queue
        left[queue] -= 1
        for other in passed:
            passed[other] += 1
        passed[queue] = 0
        if not left[queue]:
            del left[queue]


def _rank(queue: Queue) -> tuple[int, str]:
    return LANE_RANK[queue.lane], queue.capability.value


def parse_queued_job(queue: Queue, seq: int, message: bytes, stored_at: int, backlog: str = "") -> QueuedJob | None:
    """Return what a job message says; None: it is unreadable."""
    line, _, body = message.partition(b"\n")
    try:
        envelope: dict[str, Any] = orjson.loads(line)
        uploads = sum(int(upload["size"]) for upload in envelope.get("uploads", ()))
        in_blob = bool(envelope.get("body_blob"))
        size = (int(envelope.get("body_size") or 0) if in_blob else 0) + uploads
        inline = len(body) if not uploads else max(len(body) - uploads, 0)
        return QueuedJob(
            queue,
            seq,
            str(envelope["job"]),
            int(envelope.get("run", 1)),
            str(envelope.get("owner", "default")),
            str(envelope.get("shown_endpoint") or envelope["endpoint"]),
            str(envelope["public_model"]),
            bool(envelope.get("durable")),
            str(envelope.get("batch", "")),
            stored_at,
            size + inline,
            backlog,
        )
    except (ValueError, KeyError, TypeError):
        return None
