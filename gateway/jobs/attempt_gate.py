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
from gateway.jobs.terminator import read_initial_record
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
MIN_LIMIT_DELAY_S = 1.0
"""How long a job is given back at least for whose key already has all the jobs running that it may have."""
MAX_LIMIT_DELAY_S = 120.0
GATE_REQUESTS_PER_S = 50.0
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

    async def __call__(self, request: GateRequest) -> GateReply | None:
        """Never raises. None: the worker may ask again."""
        try:
            if request.kind is FrameKind.STARTED:
                return await self._decide_start(request)
            if request.kind is FrameKind.HEARTBEAT:
                return await self._decide_heartbeat(request)
            await self._record_return(request)
        except NexusError as error:
            log.warning("a worker's question is not answered", job=request.job, error=error.info.message)
        except Exception:
            log.exception("defect in the referee", job=request.job)
        return None

    # May I begin?

    async def _decide_start(self, request: GateRequest) -> GateReply:
        over, count, leased = await asyncio.gather(
            self._has_outcome(request),
            count_attempts(self._log, request.job, request.run),
            self._acquire_lease(request),
        )
        if over:
            return GateReply(kind=GONE)
        if count.open == request.token:
            return GateReply(kind=GO, attempt=count.starts)
        if not leased:
            return GateReply(kind=WAIT, delay_s=self._lease_s / 3)
        if count.starts >= MAX_STARTS:
            return GateReply(kind=DEAD, attempt=count.starts, error=_poison(count.starts).model_dump())
        attempt = count.starts + 1
        limit = self._max_running(request.key) if request.key else None
        if limit is None:
            self._run_in_background(self._record_start(request, attempt))
        elif not await self._start_within_limit(request, attempt, limit):
            return GateReply(kind=WAIT, delay_s=await self._limit_delay_s(request))
        return GateReply(kind=GO, attempt=attempt)

    def _run_in_background(self, work: Coroutine[None, None, None]) -> None:
        """Records may lag behind: the worker need not wait for them."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _has_outcome(self, request: GateRequest) -> bool:
        """Whether the job is decided. The word of an older run is in the way of a newer one: its retry was under way."""
        stored = await self._log.read_outcome(request.job)
        if stored is None:
            return False
        if stored.outcome.run >= request.run:
            return True
        await self._log.delete_outcome(request.job, stored.seq)
        return False

    async def _acquire_lease(self, request: GateRequest) -> bool:
        try:
            return await self._store.acquire_lease(request.job, request.token, self._lease_s)
        except Unavailable:
            return True

    async def _start_within_limit(self, request: GateRequest, attempt: int, limit: int) -> bool:
        """Record the start, if the key has less running than it may have. Redis away: that is not known, and jobs go on."""
        try:
            await self._record_start(request, attempt, limit)
        except LimitReached:
            return False
        return True

    async def _limit_delay_s(self, request: GateRequest) -> float:
        """The attempt does not begin. When its job may ask again: the later, the more jobs of its key do."""
        waiting = 0
        with contextlib.suppress(Unavailable):
            _, waiting = await asyncio.gather(
                self._store.release_lease(request.job, request.token), self._store.count_queued(request.key)
            )
        return min(MAX_LIMIT_DELAY_S, max(MIN_LIMIT_DELAY_S, waiting / GATE_REQUESTS_PER_S))

    async def _record_start(self, request: GateRequest, attempt: int, limit: int | None = None) -> None:
        """Raises LimitReached. What else goes wrong here, the terminal word makes good."""
        try:
            if not await self._move_to_start(request, attempt, limit) and await self._recover_record(request):
                await self._move_to_start(request, attempt, limit)
        except (IllegalMove, NexusError) as error:
            log.debug("a start is not recorded", job=request.job, error=str(error))

    async def _move_to_start(self, request: GateRequest, attempt: int, limit: int | None) -> bool:
        record = await self._store.move(
            request.owner,
            request.job,
            JobStatus.IN_PROGRESS,
            due_s=self._running_due,
            max_running=limit,
            run=request.run,
            attempts=attempt,
            worker=request.worker,
            started_at=now(),
            progress=None,
        )
        return record is not None

    def _running_due(self, record: JobRecord) -> float:
        return seconds_until_due(record, JobStatus.IN_PROGRESS, self._silence_s)

    async def _recover_record(self, request: GateRequest) -> JobRecord | None:
        """A record that was lost."""
        record = await read_initial_record(self._log, request.job)
        if record is not None:
            due_s = seconds_until_due(record, JobStatus.QUEUED, self._silence_s)
            await self._store.create(record, ttl_s=self._keep_s, due_s=due_s)
        return record

    # Does it still stand?

    async def _decide_heartbeat(self, request: GateRequest) -> GateReply:
        if await self._has_outcome(request):
            return GateReply(kind=GONE)
        try:
            if not await self._store.acquire_lease(request.job, request.token, self._lease_s):
                return GateReply(kind=STALE)
            await self._record_progress(request)
        except Unavailable:
            pass
        return GateReply(kind=GO)

    async def _record_progress(self, request: GateRequest) -> None:
        changes = {"progress": request.progress.fraction} if request.progress is not None else {}
        record = await self._store.get(request.owner, request.job) or await self._recover_record(request)
        if record is None:
            return
        if record.status is JobStatus.QUEUED:
            # No gateway heard it begin: what it stored counts.
            count = await count_attempts(self._log, request.job, request.run)
            await self._record_start(request, max(1, count.starts))
        elif record.status not in TERMINAL_STATUSES and record.run == request.run:
            await self._store.update(request.owner, request.job, due_s=self._running_due, **changes)

    async def _record_return(self, request: GateRequest) -> None:
        await self._store.release_lease(request.job, request.token)
        record = await self._store.get(request.owner, request.job)
        if record is not None and record.status is JobStatus.IN_PROGRESS and record.run == request.run:
            back: dict[str, Any] = {"worker": None, "progress": None, "attempts": max(0, record.attempts - 1)}
            due_s = seconds_until_due(
                record.model_copy(update={"status": JobStatus.QUEUED}), JobStatus.QUEUED, self._silence_s
            )
            if request.counted:
                due_s = seconds_until_due(record, JobStatus.QUEUED, self._silence_s)
                back = {"worker": None, "progress": None, "queued_at": now()}
            with contextlib.suppress(IllegalMove):  # it has ended meanwhile
                await self._store.move(request.owner, request.job, JobStatus.QUEUED, due_s=due_s, **back)


def _poison(starts: int) -> ErrorInfo:
    return BackendFailed(
        f"this job was started {starts} times and lost its worker each time", code="worker_lost", should_retry=False
    ).info
