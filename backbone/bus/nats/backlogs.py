"""One gateway's view of the backlogs: the jobs that wait in a subject of their owner until the owner's turn.

A queue is a first-in, first-out subject with a consumer, and stays short: about as many jobs wait there as there are slots. While more
wait, each further job is stored on a subject of its owner in the stream of backlogs, from where one of the gateways moves it into
the queue when it is its owner's turn (`backbone.bus.nats.backlog_releaser`). The jobs of an owner keep their order: while any job of a queue is in a
backlog, each new one goes there, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

from backbone.bus.bus import Queue
from backbone.bus.fair_order import FairOrder
from backbone.bus.fair_share import FairShare
from backbone.bus.nats.requests import CONSUMER_NOT_FOUND, JetStreamError, RequestInbox, call_api
from backbone.bus.subjects import (
    JOBS_STREAM,
    backlog_subject,
    consumer_name,
    decode_model,
    encode_owner,
    job_subject,
    parse_backlog_subject,
)
from schemas.errors import Unavailable

UNLIMITED = 1 << 40


class StartMark(NamedTuple):
    """A synchronous job of this gateway that no worker has started."""

    backlog: Backlog
    owner: str
    """The owner, as in the envelope."""
    direct: bool
    """It went straight into the queue."""


class Backlog:
    """The backlog of one queue."""

    __slots__ = ("direct_limit", "durable", "order", "queue", "started", "subject", "unconfirmed", "unstarted", "wake")

    def __init__(self, queue: Queue, weight_of: Callable[[str], float], direct_limit: int) -> None:
        self.queue = queue
        self.subject = job_subject(*queue).encode()
        self.order = FairOrder(weight_of)
        """The owners with jobs in the backlog, by their tokens."""
        self.direct_limit = direct_limit
        """While fewer jobs of this gateway wait in the queue, new ones go there directly."""
        self.unstarted = 0
        """This gateway's synchronous jobs in the queue that no worker has started."""
        self.durable = 0
        """Durable jobs that this gateway stored in the queue since it was measured, and those that waited there then."""
        self.unconfirmed = 0
        """This gateway's jobs on their way into the backlog."""
        self.started = 0
        """Jobs of which this gateway has heard that they started, since the queue was looked at."""
        self.wake = asyncio.Event()
        """Set when a job may be moved into the queue."""

    @property
    def holds_jobs(self) -> bool:
        """Whether a job is in the backlog, or on its way there."""
        return self.order.total > 0 or self.unconfirmed > 0

    @property
    def is_closed(self) -> bool:
        """Whether the next synchronous job goes into the backlog."""
        return self.order.total > 0 or self.unconfirmed > 0 or self.unstarted >= self.direct_limit

    def note_start(self) -> None:
        """Note that a job of the queue has started: the next one may come."""
        if self.order.total:
            self.started += 1
            self.wake.set()

    def subject_of(self, owner: str) -> bytes:
        """Return the subject of an owner's jobs."""
        return backlog_subject(*self.queue, owner).encode()


class Backlogs:
    """The backlogs of all queues that this gateway has used or heard of."""

    def __init__(self, share: FairShare | None = None) -> None:
        """`share`: None: every job goes straight into its queue."""
        self._share = share
        self._by_subject: dict[bytes, Backlog] = {}
        self.on_wait: Callable[[Backlog], None] = lambda _: None
        """Called when a job was stored in a backlog, by any gateway."""
        self._inbox: RequestInbox | None = None

    @property
    def enabled(self) -> bool:
        """Whether owners have backlogs."""
        return self._share is not None

    def attach(self, inbox: RequestInbox) -> None:
        """Measure queues over this connection from now on."""
        self._inbox = inbox

    def of(self, queue: Queue) -> Backlog:
        """Return the backlog of a queue."""
        subject = job_subject(*queue).encode()
        return self.find(subject) or self._add(queue, subject)

    def find(self, subject: bytes) -> Backlog | None:
        """Return the backlog of the queue with this subject, if it is known."""
        return self._by_subject.get(subject)

    def all_holding(self) -> list[Backlog]:
        """Return the backlogs that hold jobs."""
        return [backlog for backlog in self._by_subject.values() if backlog.order.total]

    def slots(self, queue: Queue) -> int:
        """Return how many jobs of the queue run at once, at least 1."""
        return max(1, self._share.slots_of(queue)) if self._share is not None else UNLIMITED

    def forget(self, queue: Queue) -> None:
        """Forget a queue that was deleted, unless jobs of it are known."""
        backlog = self.find(job_subject(*queue).encode())
        if backlog is not None and not backlog.holds_jobs and not backlog.unstarted:
            del self._by_subject[backlog.subject]

    def _add(self, queue: Queue, subject: bytes) -> Backlog:
        backlog = self._by_subject[subject] = Backlog(queue, self._weight_of, self.slots(queue))
        return backlog

    def _weight_of(self, token: str) -> float:
        assert self._share is not None
        return self._share.weight_of(decode_model(token))

    def on_notification(self, subject: bytes, _reply: bytes, _headers: bytes, _data: bytes) -> None:
        """Note a job that was stored in a backlog."""
        parts = parse_backlog_subject(subject.decode())
        if parts is None or not self.enabled:
            return
        backlog = self.of(Queue(*parts[:3]))
        backlog.order.add_waiting(encode_owner(parts[3]))
        self.on_wait(backlog)

    def update(self, stored: dict[str, int], *, may_lower: bool) -> None:
        """Take over how many jobs each subject of the stream held a moment ago.

        The gateway that moves jobs counts what it moves itself, which an older count must not undo (`may_lower`).
        """
        if not self.enabled:
            return
        counts: dict[Queue, dict[str, int]] = {}
        for subject, count in stored.items():
            if (parts := parse_backlog_subject(subject)) is not None:
                counts.setdefault(Queue(*parts[:3]), {})[encode_owner(parts[3])] = count
        for queue in counts:
            self.of(queue)
        for backlog in self._by_subject.values():
            backlog.direct_limit = self.slots(backlog.queue)
            order, found = backlog.order, counts.get(backlog.queue, {})
            for owner in {*found, *order.owners}:
                count = found.get(owner, 0)
                if may_lower or count > order.waiting(owner):
                    order.set_waiting(owner, count)
            if order.total:
                self.on_wait(backlog)

    @asynccontextmanager
    async def durable_subject(self, queue: Queue, owner: str) -> AsyncIterator[bytes]:
        """Yield the subject on which a durable job is to be stored. Raises Unavailable."""
        if not self.enabled:
            yield job_subject(*queue).encode()
            return
        backlog = self.of(queue)
        if not backlog.holds_jobs and backlog.durable >= backlog.direct_limit:
            backlog.durable = await self.count_waiting(queue)
        if not backlog.is_closed and backlog.durable < backlog.direct_limit:
            backlog.durable += 1
            yield backlog.subject
            return
        backlog.unconfirmed += 1
        try:
            yield backlog.subject_of(owner)
            self.note_backlogged(backlog, encode_owner(owner))
        finally:
            backlog.unconfirmed -= 1

    def note_backlogged(self, backlog: Backlog, owner: str) -> None:
        """Note that NATS has confirmed a job in the backlog, in case the notification of it is still on its way."""
        if not backlog.order.waiting(owner):
            backlog.order.set_waiting(owner, 1)
        self.on_wait(backlog)

    async def count_waiting(self, queue: Queue) -> int:
        """Return how many jobs wait in the queue itself. Raises Unavailable."""
        if self._inbox is None:
            return 0
        try:
            info = await call_api(self._inbox, f"CONSUMER.INFO.{JOBS_STREAM}.{consumer_name(*queue)}")
        except JetStreamError as error:
            if error.code == CONSUMER_NOT_FOUND:
                return 0
            raise Unavailable(f"NATS cannot measure the queue: {error}") from error
        return int(info["num_pending"])
