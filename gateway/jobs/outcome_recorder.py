"""Terminal words into records. All gateways share the work; each word is one gateway's at a time, until it is recorded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from backbone.bus.blobs import BlobStore
from backbone.bus.job_log import JobLog, WorkItem
from backbone.store.store import IllegalMove, Store
from gateway.jobs.attempts import with_attempt_count
from gateway.jobs.records import outcome_fields, record_from_outcome
from gateway.jobs.terminator import JobTerminator
from gateway.metrics import GatewayMetrics
from schemas.errors import NexusError
from schemas.jobs import JobStatus
from schemas.outcome import Outcome

log = structlog.get_logger(__name__)

MAX_CONCURRENCY = 64
ACK_WAIT_S = 15.0
RETRY_DELAY_S = 1.0
DEFECT_RETRY_DELAY_S = 30.0

Enqueue = Callable[[Outcome], Awaitable[None]]


class OutcomeRecorder:
    """See the module's docstring."""

    def __init__(
        self,
        jobs: JobLog,
        store: Store,
        blobs: BlobStore,
        terminator: JobTerminator,
        metrics: GatewayMetrics,
        *,
        keep_s: float,
        enqueue: Enqueue,
    ) -> None:
        """`enqueue`: what a word with a webhook is given to; it raises Unavailable."""
        self._log = jobs
        self._store = store
        self._blobs = blobs
        self._terminator = terminator
        self._metrics = metrics
        self._keep_s = keep_s
        self._enqueue = enqueue
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Take words until cancelled."""
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
        """Redis away: the word waits, and so does its webhook."""
        try:
            try:
                outcome, _ = Outcome.decode(item.data)
            except ValueError:
                log.exception("malformed terminal word dropped", job=item.id)
                await item.ack()
                return
            outcome = await with_attempt_count(self._log, outcome)
            await self._update_record(outcome, item.stored_at)
            if outcome.status is not JobStatus.FAILED:  # which may be tried again
                for name in outcome.uploads:
                    self._blobs.remove(name)
            if not outcome.token:
                # Whoever said it may have died before it was out of the queue, where perhaps no worker ever takes it.
                await self._terminator.remove_from_queue(
                    await self._store.get(outcome.owner, outcome.job) or record_from_outcome(outcome)
                )
            if outcome.webhook:
                await self._enqueue(outcome)
            await item.ack()
        except NexusError as error:
            log.info("a job's end is not recorded yet", job=item.id, error=error.info.message)
            item.nak(RETRY_DELAY_S)
        except Exception:
            log.exception("defect in the recorder", job=item.id)
            item.nak(DEFECT_RETRY_DELAY_S)

    async def _update_record(self, outcome: Outcome, at: int) -> None:
        try:
            # A record that was lost may be made anew by others meanwhile, as of a job that has not ended.
            while (
                await self._store.move(outcome.owner, outcome.job, outcome.status, **outcome_fields(outcome, at))
                is None
            ):
                if await self._store.create(record_from_outcome(outcome, at), ttl_s=self._keep_s):
                    break
        except IllegalMove:
            return  # recorded before, or an older run's
        after: list[Awaitable[object]] = []
        if outcome.token:
            after.append(self._store.release_lease(outcome.job, outcome.token))
        if outcome.status is JobStatus.COMPLETED and outcome.seconds is not None:
            after.append(self._store.record_service_time(outcome.capability.value, outcome.model, outcome.seconds))
        await asyncio.gather(*after)
        self._metrics.child(
            self._metrics.jobs_ended, outcome.capability.value, outcome.model, outcome.status.value
        ).inc()
        if outcome.dead:
            self._metrics.child(self._metrics.dead_letters, outcome.capability.value, outcome.model).inc()
