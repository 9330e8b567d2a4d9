"""Ends jobs that reach their queue limit or timeout, and requeues jobs whose worker is silent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog

from backbone.bus.job_log import OutcomeStore
from backbone.store.store import DueJob, IllegalMove, Store
from gateway.jobs.attempt_history import WORKER_LOST, end_attempt, now_ms
from gateway.jobs.content_retention import ContentRetention
from gateway.jobs.records import now, queue_deadline, seconds_until_due
from gateway.jobs.terminator import JobTerminator
from schemas.errors import DeadlineExceeded, ErrorInfo, NexusError
from schemas.jobs import TERMINAL_STATUSES, JobRecord, JobStatus

log = structlog.get_logger(__name__)

POLL_INTERVAL_S = 0.5
MAX_DUE_JOBS = 100
QUEUE_TIMEOUT = "queue_timeout"


class ExpiryWatcher:
    """Checks due jobs. All gateways poll; each due job is claimed by one of them."""

    def __init__(
        self,
        jobs: OutcomeStore,
        store: Store,
        terminator: JobTerminator,
        *,
        ack_wait_s: float,
        content: ContentRetention | None = None,
        is_held: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Create a watcher. `content`: None where no job is sealed. `is_held`: whether an operator holds a model's jobs."""
        self._is_held = is_held
        self._content = content
        self._log = jobs
        self._store = store
        self._terminator = terminator
        self._silence_s = 3 * ack_wait_s

    async def run(self) -> None:
        """Poll for due jobs until cancelled."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            try:
                for due in await self._store.claim_due(MAX_DUE_JOBS):
                    await self._check(due)
            except NexusError as error:
                log.debug("expiry.unavailable", error=error.info.message)
            except Exception:
                log.exception("expiry.defect")

    async def _check(self, due: DueJob) -> None:
        record = await self._store.get(due.owner, due.job)
        if record is not None and record.status in TERMINAL_STATUSES and record.sealed and self._content is not None:
            await self._content.expire(record)
            return
        if record is None or record.status in TERMINAL_STATUSES or await self._record_outcome(record):
            return
        reason = self._expiry_error(record)
        if reason is not None and reason.code == QUEUE_TIMEOUT and self._is_held(record.model):
            await self._restart_wait(record)
        elif reason is not None:
            await self._terminator.terminate(record, JobStatus.EXPIRED, reason)
        elif record.status is JobStatus.IN_PROGRESS:
            await self._requeue(record)
        else:
            left = seconds_until_due(record, JobStatus.QUEUED, self._silence_s)
            await self._store.update(record.owner, record.job, due_s=left)

    async def _restart_wait(self, record: JobRecord) -> None:
        """Let a held job wait for its whole queue limit again: it is not to expire because an operator holds it."""
        at = now()
        left = seconds_until_due(record.model_copy(update={"queued_at": at}), JobStatus.QUEUED, self._silence_s)
        with contextlib.suppress(IllegalMove):
            await self._store.update(record.owner, record.job, run=record.run, queued_at=at, due_s=left)

    async def _record_outcome(self, record: JobRecord) -> bool:
        """Write the outcome of an ended job into its record, and return whether there is one.

        A recovered record may lack an outcome that was recorded before the loss.
        """
        stored = await self._log.read_outcome(record.job)
        if stored is None or stored.outcome.run < record.run:
            return False
        await self._terminator.record_outcome(stored)
        return True

    async def _requeue(self, record: JobRecord) -> None:
        """Mark the job of a silent worker as queued: NATS redelivers it to another worker."""
        due_s = seconds_until_due(record, JobStatus.QUEUED, self._silence_s)
        back: dict[str, Any] = {"worker": None, "progress": None, "run": record.run, "queued_at": now()}
        back["history"] = partial(end_attempt, end=WORKER_LOST, at_ms=now_ms())
        with contextlib.suppress(IllegalMove):  # the job has ended in the meantime
            await self._store.move(record.owner, record.job, JobStatus.QUEUED, due_s=due_s, **back)

    def _expiry_error(self, record: JobRecord) -> ErrorInfo | None:
        at = now()
        if record.expires_at is not None and at >= record.expires_at:
            seconds = record.expires_at - record.created_at
            return DeadlineExceeded(
                f"The job did not end within its timeout of {seconds:g} s. Submit it with a longer `timeout`."
            ).info
        if record.status is JobStatus.QUEUED and at >= queue_deadline(record):
            return DeadlineExceeded(
                f"No worker took the job within the queue limit of {record.queue_s:g} s. Retry later, or start another worker for the model.",
                code=QUEUE_TIMEOUT,
            ).info
        return None
