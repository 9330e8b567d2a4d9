"""The attempt gate: decides whether a worker may start or continue an attempt at a durable job.

Any gateway can decide, because all state is in NATS and Redis.

| request | condition | verdict |
|---|---|---|
| STARTED | the run has an outcome | STOP |
| STARTED | this attempt has already started | PROCEED |
| STARTED | another attempt holds the lease | WAIT |
| STARTED | the run has used up its starts | EXHAUSTED |
| STARTED | the API key has reached its limit of running jobs | WAIT |
| STARTED | otherwise | PROCEED |
| HEARTBEAT | the run has an outcome | STOP |
| HEARTBEAT | another attempt holds the lease | SUPERSEDED |
| HEARTBEAT | otherwise | PROCEED |
| RETURNED | any | none: the gate only records it |
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from functools import partial
from time import monotonic
from typing import Any

import structlog

from backbone.bus.bus import Queue
from backbone.bus.content_keys import ContentKeys
from backbone.bus.job_log import JobHistory
from backbone.store.store import IllegalMove, JobLimit, LimitReached, Store
from gateway.jobs.attempt_history import RETURNED, begin_attempt, end_attempt, now_ms
from gateway.jobs.attempts import count_attempts
from gateway.jobs.records import now, seconds_until_due
from gateway.jobs.terminator import read_initial_record
from gateway.traces import JobTraces, LostAttempt
from schemas.errors import BackendFailed, ErrorInfo, NexusError, Unavailable
from schemas.frames import FrameKind
from schemas.job_events import GateReply, GateRequest, GateVerdict
from schemas.jobs import MAX_STARTS, TERMINAL_STATUSES, JobRecord, JobStatus

log = structlog.get_logger(__name__)

LEASE_SHARE = 0.9
"""The lease as a share of ack_wait: a dead attempt's lease ends before NATS redelivers its job."""
MIN_LIMIT_DELAY_S = 1.0
"""The minimum redelivery delay of a job whose API key has reached its limit of running jobs."""
MAX_LIMIT_DELAY_S = 120.0
GATE_REQUESTS_PER_S = 50.0
"""The target rate of gate requests of all jobs of one such key. Redelivered jobs precede new ones, so a higher rate would keep
workers from the jobs of other keys.
"""


class AttemptGate:
    """Answers the gate requests of workers. The instance is callable with a request."""

    def __init__(
        self,
        jobs: JobHistory,
        store: Store,
        *,
        ack_wait_s: float,
        keep_s: float,
        max_running: Callable[[str], JobLimit | None],
        content_keys: ContentKeys | None = None,
        on_start: Callable[[Queue], None] = lambda _: None,
        traces: JobTraces | None = None,
    ) -> None:
        """Create a gate.

        Args:
            jobs: The job log.
            store: The record store.
            ack_wait_s: The time after which NATS redelivers an unacknowledged job.
            keep_s: The retention time of recovered records.
            content_keys: The keys of sealed jobs. None: no job is sealed.
            max_running: Returns the limit of running jobs of an API key and its owner, by the key's id.
            on_start: Called with the queue of each job that starts.
            traces: Records the attempts whose workers fell silent. None: tracing is off.
        """
        self._log = jobs
        self._store = store
        self._lease_s = LEASE_SHARE * ack_wait_s
        self._silence_s = 3 * ack_wait_s
        self._keep_s = keep_s
        self._max_running = max_running
        self._content_keys = content_keys
        self._on_start = on_start
        self._traces = traces
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for records that are being written."""
        await asyncio.gather(*self._tasks)

    async def __call__(self, request: GateRequest) -> GateReply | None:
        """Decide a request. Return None if the worker should ask again or expects no reply. Never raises."""
        try:
            if request.kind is FrameKind.STARTED:
                reply = await self._decide_start(request)
                proceeds = reply.kind is GateVerdict.PROCEED
                return await self._with_key(request, reply) if request.sealed and proceeds else reply
            if request.kind is FrameKind.HEARTBEAT:
                return await self._decide_heartbeat(request)
            await self._record_return(request)
        except NexusError as error:
            log.warning("gate.request_failed", job=request.job, error=error.info.message)
        except Exception:
            log.exception("gate.defect", job=request.job)
        return None

    # STARTED

    async def _with_key(self, request: GateRequest, reply: GateReply) -> GateReply:
        """Return the grant with the content key of a sealed job."""
        content = await self._content_keys.find(request.job) if self._content_keys is not None else None
        if content is None:
            return GateReply(kind=GateVerdict.EXHAUSTED, attempt=reply.attempt, error=_FORGOTTEN.model_dump())
        return reply.model_copy(update={"key": str(content.key)})

    async def _decide_start(self, request: GateRequest) -> GateReply:
        over, count, leased = await asyncio.gather(
            self._has_outcome(request),
            count_attempts(self._log, request.job, request.run),
            self._acquire_lease(request),
        )
        if over:
            return GateReply(kind=GateVerdict.STOP)
        if count.open == request.token:
            return GateReply(kind=GateVerdict.PROCEED, attempt=count.starts)
        if not leased:
            return GateReply(kind=GateVerdict.WAIT, delay_s=self._lease_s / 3)
        if count.starts >= MAX_STARTS:
            return GateReply(kind=GateVerdict.EXHAUSTED, attempt=count.starts, error=_poison(count.starts).model_dump())
        attempt = count.starts + 1
        limit = self._max_running(request.key) if request.key else None
        if limit is None:
            self._run_in_background(self._record_start(request, attempt))
        elif not await self._start_within_limit(request, attempt, limit):
            return GateReply(kind=GateVerdict.WAIT, delay_s=await self._limit_delay_s(request))
        return GateReply(kind=GateVerdict.PROCEED, attempt=attempt)

    def _run_in_background(self, work: Coroutine[None, None, None]) -> None:
        """Write a record in the background: the worker need not wait for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _has_outcome(self, request: GateRequest) -> bool:
        """Return whether the run has an outcome. Delete the outcome of an older run that an unfinished retry left behind."""
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

    async def _start_within_limit(self, request: GateRequest, attempt: int, limit: JobLimit) -> bool:
        """Record the start unless the key has reached its limit. Without Redis the limit is unknown, and the job starts."""
        try:
            await self._record_start(request, attempt, limit)
        except LimitReached:
            return False
        return True

    async def _limit_delay_s(self, request: GateRequest) -> float:
        """Release the lease and return the seconds until the job may ask again. More waiting jobs of the key mean more seconds."""
        waiting = 0
        with contextlib.suppress(Unavailable):
            _, waiting = await asyncio.gather(
                self._store.release_lease(request.job, request.token), self._store.count_queued(request.key)
            )
        return min(MAX_LIMIT_DELAY_S, max(MIN_LIMIT_DELAY_S, waiting / GATE_REQUESTS_PER_S))

    async def _record_start(self, request: GateRequest, attempt: int, limit: JobLimit | None = None) -> None:
        """Record the start of an attempt. Raises LimitReached. The outcome corrects any other failure."""
        try:
            if not await self._move_to_start(request, attempt, limit) and await self._recover_record(request):
                await self._move_to_start(request, attempt, limit)
        except (IllegalMove, NexusError) as error:
            log.debug("gate.start_not_recorded", job=request.job, error=str(error))

    async def _trace_lost_attempt(self, request: GateRequest, traces: JobTraces) -> None:
        """Record the attempt before this one, if it ended without a word."""
        record = await self._store.get(request.owner, request.job)
        if (
            record is None
            or not record.traceparent
            or (record.status, record.run) != (JobStatus.IN_PROGRESS, request.run)
        ):
            return
        seen = monotonic()
        began = seen - max(0, now() - (record.started_at or now()))
        lost = LostAttempt(record.worker or "", record.attempts, began, seen)
        traces.record_lost_attempt(record.traceparent, record.job, lost)

    async def _move_to_start(self, request: GateRequest, attempt: int, limit: JobLimit | None) -> bool:
        if self._traces is not None and attempt > 1:
            await self._trace_lost_attempt(request, self._traces)
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
            history=partial(begin_attempt, run=request.run, number=attempt, worker=request.worker, at_ms=now_ms()),
        )
        if record is None:
            return False
        self._on_start(Queue(record.capability, record.lane, record.model))
        return True

    def _running_due(self, record: JobRecord) -> float:
        return seconds_until_due(record, JobStatus.IN_PROGRESS, self._silence_s)

    async def _recover_record(self, request: GateRequest) -> JobRecord | None:
        """Recover a record that Redis lost. Return None if the job log does not hold it either."""
        record = await read_initial_record(self._log, request.job)
        if record is not None:
            due_s = seconds_until_due(record, JobStatus.QUEUED, self._silence_s)
            await self._store.create(record, ttl_s=self._keep_s, due_s=due_s)
        return record

    # HEARTBEAT and RETURNED

    async def _decide_heartbeat(self, request: GateRequest) -> GateReply:
        if await self._has_outcome(request):
            return GateReply(kind=GateVerdict.STOP)
        try:
            if not await self._store.acquire_lease(request.job, request.token, self._lease_s):
                return GateReply(kind=GateVerdict.SUPERSEDED)
            await self._record_progress(request)
        except Unavailable:
            pass
        return GateReply(kind=GateVerdict.PROCEED)

    async def _record_progress(self, request: GateRequest) -> None:
        changes = {"progress": request.progress.fraction} if request.progress is not None else {}
        record = await self._store.get(request.owner, request.job) or await self._recover_record(request)
        if record is None:
            return
        if record.status is JobStatus.QUEUED:
            # No gateway answered at the start, so the stored events count.
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
            back["history"] = partial(end_attempt, end=RETURNED, at_ms=now_ms(), code=request.code or None)
            with contextlib.suppress(IllegalMove):  # the job has ended in the meantime
                await self._store.move(request.owner, request.job, JobStatus.QUEUED, due_s=due_s, **back)


_FORGOTTEN = BackendFailed(
    "The request of this job was deleted before it could run. Submit it again.", code="content_gone", should_retry=False
).info


def _poison(starts: int) -> ErrorInfo:
    return BackendFailed(
        f"The job was started {starts} times and lost its worker each time. Check the logs of its workers.",
        code="worker_lost",
        should_retry=False,
    ).info
