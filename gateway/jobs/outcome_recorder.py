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

AT_ONCE = 64
HOLD_S = 15.0
AGAIN_S = 1.0
DEFECT_AGAIN_S = 30.0

Enqueue = Callable[[Outcome], Awaitable[None]]


class OutcomeRecorder:
    """See the module's docstring."""

    def __init__(
        self,
        jobs: JobLog,
        store: Store,
        blobs: BlobStore,
        ending: JobTerminator,
        metrics: GatewayMetrics,
        *,
        keep_s: float,
        enqueue: Enqueue,
    ) -> None:
        """`enqueue`: what a word with a webhook is given to; it raises Unavailable."""
        self._log = jobs
        self._store = store
        self._blobs = blobs
        self._ending = ending
        self._metrics = metrics
        self._keep_s = keep_s
        self._enqueue = enqueue
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Take words until cancelled."""
        words = self._log.consume_outcomes(max_unacked=AT_ONCE, ack_wait_s=HOLD_S)
        try:
            async for item in words:
                task = asyncio.create_task(self._record(item))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            for task in list(self._tasks):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await words.aclose()

    async def _record(self, item: WorkItem) -> None:
        """Redis away: the word waits, and so does its webhook."""
        try:
            try:
                word, _ = Outcome.decode(item.data)
            except ValueError:
                log.exception("malformed terminal word dropped", job=item.id)
                await item.ack()
                return
            word = await with_attempt_count(self._log, word)
            await self._to_store(word, item.stored_at)
            if word.status is not JobStatus.FAILED:  # which may be tried again
                for name in word.uploads:
                    self._blobs.remove(name)
            if not word.token:
                # Whoever said it may have died before it was out of the queue, where perhaps no worker ever takes it.
                await self._ending.withdraw(await self._store.get(word.owner, word.job) or record_from_outcome(word))
            if word.webhook:
                await self._enqueue(word)
            await item.ack()
        except NexusError as error:
            log.info("a job's end is not recorded yet", job=item.id, error=error.info.message)
            item.nak(AGAIN_S)
        except Exception:
            log.exception("defect in the recorder", job=item.id)
            item.nak(DEFECT_AGAIN_S)

    async def _to_store(self, word: Outcome, at: int) -> None:
        try:
            # A record that was lost may be made anew by others meanwhile, as of a job that has not ended.
            while await self._store.move(word.owner, word.job, word.status, **outcome_fields(word, at)) is None:
                if await self._store.create(record_from_outcome(word, at), ttl_s=self._keep_s):
                    break
        except IllegalMove:
            return  # recorded before, or an older run's
        after: list[Awaitable[object]] = []
        if word.token:
            after.append(self._store.release_lease(word.job, word.token))
        if word.status is JobStatus.COMPLETED and word.seconds is not None:
            after.append(self._store.record_service_time(word.capability.value, word.model, word.seconds))
        await asyncio.gather(*after)
        self._metrics.child(self._metrics.jobs_ended, word.capability.value, word.model, word.status.value).inc()
        if word.dead:
            self._metrics.child(self._metrics.dead_letters, word.capability.value, word.model).inc()
