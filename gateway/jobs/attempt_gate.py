"""What workers are answered when they ask about a durable job. Any gateway answers; what it knows is stored, not its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from backbone.bus.job_log import JobLog
from backbone.store.store import IllegalMove, LimitReached, Store
from gateway.jobs.attempts import count_attempts
from gateway.jobs.records import now, seconds_until_due
from gateway.jobs.terminator import first_event_record
from schemas.errors import BackendFailed, ErrorInfo, NexusError, Unavailable
from schemas.frames import FrameKind
from schemas.job_events import GateReply, GateRequest, GateVerdict
from schemas.jobs import MAX_STARTS, TERMINAL_STATUSES, JobRecord, JobStatus

log = structlog.get_logger(__name__)

GO, GONE, STALE, WAIT, DEAD = (
    GateVerdict.PROCEED,
    GateVerdict.STOP,
    GateVerdict.SUPERSEDED,
    GateVerdict.WAIT,
    GateVerdict.EXHAUSTED,
)
LEASE_SHARE = 0.9
"""Of ack_wait: a dead attempt's lease is over when NATS gives its job to the next worker."""
LIMITED_S = 1.0
"""How long a job is given back at least for whose key already has all the jobs running that it may have."""
MOST_LIMITED_S = 120.0
ASKS_PER_S = 50.0
"""How often the jobs of such a key ask, together, however many they are: what was given back comes before what is new, and
would else keep workers from everybody else's jobs.
"""


class AttemptGate:
    """Call it with what a worker asks."""

    def __init__(
        self,
        jobs: JobLog,
        store: Store,
        *,
        ack_wait_s: float,
        keep_s: float,
        max_running: Callable[[str], int | None],
    ) -> None:
        """`max_running`: how many jobs of a key, by its id, may run at once."""
        self._log = jobs
        self._store = store
        self._lease_s = LEASE_SHARE * ack_wait_s
        self._silence_s = 3 * ack_wait_s
        self._keep_s = keep_s
        self._max_running = max_running
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for what is being recorded."""
        await asyncio.gather(*self._tasks)

    async def __call__(self, ask: GateRequest) -> GateReply | None:
        """Never raises. None: the worker may ask again."""
        try:
            if ask.kind is FrameKind.STARTED:
                return await self._may_begin(ask)
            if ask.kind is FrameKind.HEARTBEAT:
                return await self._still_stands(ask)
            await self._given_back(ask)
        except NexusError as error:
            log.warning("a worker's question is not answered", job=ask.job, error=error.info.message)
        except Exception:
            log.exception("defect in the referee", job=ask.job)
        return None

    # May I begin?

    async def _may_begin(self, ask: GateRequest) -> GateReply:
        over, seen, leased = await asyncio.gather(
            self._is_over(ask), count_attempts(self._log, ask.job, ask.run), self._lease(ask)
        )
        if over:
            return GateReply(kind=GONE)
        if seen.open == ask.token:
            return GateReply(kind=GO, attempt=seen.starts)
        if not leased:
            return GateReply(kind=WAIT, delay_s=self._lease_s / 3)
        if seen.starts >= MAX_STARTS:
            return GateReply(kind=DEAD, attempt=seen.starts, error=_poison(seen.starts).model_dump())
        attempt = seen.starts + 1
        limit = self._max_running(ask.key) if ask.key else None
        if limit is None:
            self._later(self._record_start(ask, attempt))
        elif not await self._has_room(ask, attempt, limit):
            return GateReply(kind=WAIT, delay_s=await self._crowded_s(ask))
        return GateReply(kind=GO, attempt=attempt)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        """Records may lag behind: the worker need not wait for them."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _is_over(self, ask: GateRequest) -> bool:
        """Whether the job is decided. The word of an older run is in the way of a newer one: its retry was under way."""
        decision = await self._log.read_outcome(ask.job)
        if decision is None:
            return False
        if decision.outcome.run >= ask.run:
            return True
        await self._log.delete_outcome(ask.job, decision.seq)
        return False

    async def _lease(self, ask: GateRequest) -> bool:
        try:
            return await self._store.acquire_lease(ask.job, ask.token, self._lease_s)
        except Unavailable:
            return True

    async def _has_room(self, ask: GateRequest, attempt: int, limit: int) -> bool:
        """Record the start, if the key has less running than it may have. Redis away: that is not known, and jobs go on."""
        try:
            await self._record_start(ask, attempt, limit)
        except LimitReached:
            return False
        return True

    async def _crowded_s(self, ask: GateRequest) -> float:
        """The attempt does not begin. When its job may ask again: the later, the more jobs of its key do."""
        waiting = 0
        with contextlib.suppress(Unavailable):
            _, waiting = await asyncio.gather(
                self._store.release_lease(ask.job, ask.token), self._store.count_queued(ask.key)
            )
        return min(MOST_LIMITED_S, max(LIMITED_S, waiting / ASKS_PER_S))

    async def _record_start(self, ask: GateRequest, attempt: int, limit: int | None = None) -> None:
        """Raises LimitReached. What else goes wrong here, the terminal word makes good."""
        try:
            if not await self._move_to_start(ask, attempt, limit) and await self._rebuilt(ask):
                await self._move_to_start(ask, attempt, limit)
        except (IllegalMove, NexusError) as error:
            log.debug("a start is not recorded", job=ask.job, error=str(error))

    async def _move_to_start(self, ask: GateRequest, attempt: int, limit: int | None) -> bool:
        record = await self._store.move(
            ask.owner,
            ask.job,
            JobStatus.IN_PROGRESS,
            due_s=self._running_due,
            max_running=limit,
            run=ask.run,
            attempts=attempt,
            worker=ask.worker,
            started_at=now(),
            progress=None,
        )
        return record is not None

    def _running_due(self, record: JobRecord) -> float:
        return seconds_until_due(record, JobStatus.IN_PROGRESS, self._silence_s)

    async def _rebuilt(self, ask: GateRequest) -> JobRecord | None:
        """A record that was lost."""
        record = await first_event_record(self._log, ask.job)
        if record is not None:
            due_s = seconds_until_due(record, JobStatus.QUEUED, self._silence_s)
            await self._store.create(record, ttl_s=self._keep_s, due_s=due_s)
        return record

    # Does it still stand?

    async def _still_stands(self, ask: GateRequest) -> GateReply:
        if await self._is_over(ask):
            return GateReply(kind=GONE)
        try:
            if not await self._store.acquire_lease(ask.job, ask.token, self._lease_s):
                return GateReply(kind=STALE)
            await self._record_progress(ask)
        except Unavailable:
            pass
        return GateReply(kind=GO)

    async def _record_progress(self, ask: GateRequest) -> None:
        changes = {"progress": ask.progress.fraction} if ask.progress is not None else {}
        record = await self._store.get(ask.owner, ask.job) or await self._rebuilt(ask)
        if record is None:
            return
        if record.status is JobStatus.QUEUED:
            # No gateway heard it begin: what it stored counts.
            seen = await count_attempts(self._log, ask.job, ask.run)
            await self._record_start(ask, max(1, seen.starts))
        elif record.status not in TERMINAL_STATUSES and record.run == ask.run:
            await self._store.update(ask.owner, ask.job, due_s=self._running_due, **changes)

    async def _given_back(self, ask: GateRequest) -> None:
        await self._store.release_lease(ask.job, ask.token)
        record = await self._store.get(ask.owner, ask.job)
        if record is not None and record.status is JobStatus.IN_PROGRESS and record.run == ask.run:
            back: dict[str, Any] = {"worker": None, "progress": None, "attempts": max(0, record.attempts - 1)}
            due_s = seconds_until_due(
                record.model_copy(update={"status": JobStatus.QUEUED}), JobStatus.QUEUED, self._silence_s
            )
            if ask.counted:
                due_s = seconds_until_due(record, JobStatus.QUEUED, self._silence_s)
                back = {"worker": None, "progress": None, "queued_at": now()}
            with contextlib.suppress(IllegalMove):  # it has ended meanwhile
                await self._store.move(ask.owner, ask.job, JobStatus.QUEUED, due_s=due_s, **back)


def _poison(starts: int) -> ErrorInfo:
    return BackendFailed(
        f"this job was started {starts} times and lost its worker each time", code="worker_lost", should_retry=False
    ).info
