"""Writes outcomes into job records. All gateways share the work; each outcome is held by one gateway until it is recorded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from time import monotonic

import structlog

from backbone.bus.blobs import BlobStore
from backbone.bus.bus import Queue
from backbone.bus.job_log import JobHistory, WorkItem
from backbone.store.store import IllegalMove, Store
from gateway.inspector.inspector import Inspector
from gateway.jobs.attempts import with_attempt_count
from gateway.jobs.content_retention import ContentRetention
from gateway.jobs.records import outcome_fields, record_from_outcome
from gateway.jobs.storage_quotas import JobStorageQuotas
from gateway.jobs.terminator import JobTerminator
from gateway.jobs.usage import OutcomeUsage
from gateway.metrics import GatewayMetrics
from gateway.traces import JobTraces
from schemas.errors import NexusError
from schemas.jobs import JobStatus
from schemas.outcome import Outcome

log = structlog.get_logger(__name__)

MAX_CONCURRENCY = 64
ACK_WAIT_S = 15.0
RETRY_DELAY_S = 1.0
DEFECT_RETRY_DELAY_S = 30.0

Enqueue = Callable[[Outcome], Awaitable[None]]
Settle = Callable[[Outcome, int, int], None]
"""(outcome, tokens that the job had reserved, when the outcome was stored)"""
RecordUse = Callable[[Queue, str, float], None]


class OutcomeRecorder:
    """Consumes outcomes: updates records, deletes uploads, queues webhooks."""

    def __init__(
        self,
        jobs: JobHistory,
        store: Store,
        blobs: BlobStore,
        terminator: JobTerminator,
        metrics: GatewayMetrics,
        *,
        keep_s: float,
        enqueue: Enqueue,
        usage: OutcomeUsage | None = None,
        settle: Settle = lambda _outcome, _reserved, _at: None,
        storage: JobStorageQuotas | None = None,
        content: ContentRetention | None = None,
        record_use: RecordUse = lambda _queue, _owner, _seconds: None,
        traces: JobTraces | None = None,
        inspector: Inspector | None = None,
    ) -> None:
        """Create a recorder. `traces`: None where tracing is off. `enqueue` queues the webhook of an outcome and raises Unavailable if it cannot. `usage`: None
        without a ledger.

        `storage`: None where the bytes of owners are not bounded. `content`: None where no job is sealed. `settle` receives each
        outcome of a key's job once, when its record is written; `record_use` the seconds for which each attempt had a slot.
        """
        self._log = jobs
        self._store = store
        self._blobs = blobs
        self._terminator = terminator
        self._metrics = metrics
        self._keep_s = keep_s
        self._enqueue = enqueue
        self._usage = usage
        self._settle = settle
        self._storage = storage
        self._content = content
        self._record_use = record_use
        self._traces = traces
        self._inspector = inspector
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Record outcomes until cancelled."""
        outcomes = self._log.consume_outcomes(max_unacked=MAX_CONCURRENCY, ack_wait_s=ACK_WAIT_S)
        try:
            async for item in outcomes:
                task = asyncio.create_task(self._record(item))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            for task in list(self._tasks):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await outcomes.aclose()

    async def _record(self, item: WorkItem) -> None:
        """Record one outcome. While Redis is unavailable, the outcome and its webhook wait."""
        try:
            try:
                outcome, payload = Outcome.decode(item.data)
            except ValueError:
                log.exception("outcome.malformed", job=item.id)
                await item.ack()
                return
            began = monotonic()
            outcome = await with_attempt_count(self._log, outcome)
            await self._update_record(outcome, item.stored_at)
            if self._traces is not None:
                outcome = await self._with_trace(outcome)
            if outcome.status is not JobStatus.FAILED:  # a retry of a failed job needs its uploads
                for name in outcome.uploads:
                    self._blobs.remove(name)
                if self._storage is not None:
                    await self._storage.release_bodies(outcome)
            if self._storage is not None:
                await self._storage.count_result(outcome, payload)
            if self._content is not None:
                await self._content.record_end(outcome)
            if not outcome.token:
                # The gateway that decided it may have died before it removed the job from the queue.
                await self._terminator.remove_from_queue(
                    await self._store.get(outcome.owner, outcome.job) or record_from_outcome(outcome)
                )
            if self._usage is not None:
                await self._usage.store(outcome, item.stored_at)
            if outcome.webhook:
                await self._enqueue(outcome)
            await item.ack()
            if self._inspector is not None:
                self._inspector.record_outcome(outcome, payload, outcome.seconds)
            if self._traces is not None:
                error_code = outcome.error.code or outcome.error.type if outcome.error is not None else ""
                self._traces.record_outcome(outcome.traceparent, outcome.job, outcome.status, error_code, began)
        except NexusError as error:
            log.info("outcome.not_recorded", job=item.id, error=error.info.message)
            item.nak(RETRY_DELAY_S)
        except Exception:
            log.exception("outcome.defect", job=item.id)
            item.nak(DEFECT_RETRY_DELAY_S)

    async def _with_trace(self, outcome: Outcome) -> Outcome:
        """Return the outcome with the trace of its job, which only those of workers name."""
        if outcome.traceparent:
            return outcome
        record = await self._store.get(outcome.owner, outcome.job)
        traceparent = record.traceparent if record is not None else None
        return outcome.model_copy(update={"traceparent": traceparent or ""})

    async def _update_record(self, outcome: Outcome, at: int) -> None:
        try:
            # Another gateway may recover a lost record in the meantime, as that of an unfinished job.
            while (
                record := await self._store.move(
                    outcome.owner, outcome.job, outcome.status, **outcome_fields(outcome, at)
                )
            ) is None:
                if await self._store.create(record_from_outcome(outcome, at), ttl_s=self._keep_s):
                    break
        except IllegalMove:
            return  # already recorded, or an outcome of an older run
        if outcome.key and record is not None:
            self._settle(outcome, record.reserved_tokens or 0, at)
        if outcome.seconds is not None:
            self._record_use(Queue(outcome.capability, outcome.lane, outcome.model), outcome.owner, outcome.seconds)
        after: list[Awaitable[object]] = []
        if outcome.token and outcome.status is not JobStatus.COMPLETED:  # after COMPLETED no attempt follows
            after.append(self._store.release_lease(outcome.job, outcome.token))
        if outcome.status is JobStatus.COMPLETED and outcome.seconds is not None:
            after.append(self._store.record_service_time(outcome.capability.value, outcome.model, outcome.seconds))
        await asyncio.gather(*after)
        self._metrics.child(
            self._metrics.jobs_ended, outcome.capability.value, outcome.model, outcome.status.value
        ).inc()
        if (usage := outcome.usage) is not None:
            self._metrics.child(self._metrics.tokens, "prompt", outcome.model).inc(usage.prompt_tokens)
            self._metrics.child(self._metrics.tokens, "completion", outcome.model).inc(usage.completion_tokens)
        if outcome.dead:
            self._metrics.child(self._metrics.dead_letters, outcome.capability.value, outcome.model).inc()
