"""Jobs whose time is over: those that waited too long, those with a time-out, and those whose worker has fallen silent."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from backbone.store.store import DueJob, IllegalMove, Store
from gateway.jobs.records import now, outcome_fields, queue_deadline, seconds_until_due
from gateway.jobs.terminator import JobTerminator
from schemas.errors import DeadlineExceeded, ErrorInfo, NexusError
from schemas.jobs import TERMINAL_STATUSES, JobRecord, JobStatus

log = structlog.get_logger(__name__)

POLL_INTERVAL_S = 0.5
MAX_DUE_JOBS = 100


class ExpiryWatcher:
    """All gateways look; each due job is one gateway's."""

    def __init__(self, store: Store, terminator: JobTerminator, *, ack_wait_s: float) -> None:
        self._store = store
        self._terminator = terminator
        self._silence_s = 3 * ack_wait_s

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            try:
                for due in await self._store.claim_due(MAX_DUE_JOBS):
                    await self._check(due)
            except NexusError as error:
                log.debug("timers wait", error=error.info.message)
            except Exception:
                log.exception("defect in the timers")

    async def _check(self, due: DueJob) -> None:
        record = await self._store.get(due.owner, due.job)
        if record is None or record.status in TERMINAL_STATUSES or await self._record_outcome(record):
            return
        reason = self._expiry_error(record)
        if reason is not None:
            await self._terminator.terminate(record, JobStatus.EXPIRED, reason)
        elif record.status is JobStatus.IN_PROGRESS:
            await self._requeue(record)
        else:
            left = seconds_until_due(record, JobStatus.QUEUED, self._silence_s)
            await self._store.update(record.owner, record.id, due_s=left)

    async def _record_outcome(self, record: JobRecord) -> bool:
        """Then its record says so: it may have been lost, and made anew by somebody who came too late."""
        stored = await self._terminator.decided(record.id)
        if stored is None or stored.outcome.run < record.run:
            return False
        with contextlib.suppress(IllegalMove):  # recorded meanwhile
            outcome = stored.outcome
            await self._store.move(record.owner, record.id, outcome.status, **outcome_fields(outcome, stored.stored_at))
        return True

    async def _requeue(self, record: JobRecord) -> None:
        """No sign of its worker: NATS gives it to the next one. Until that begins, the job waits."""
        due_s = seconds_until_due(record, JobStatus.QUEUED, self._silence_s)
        back = {"worker": None, "progress": None, "run": record.run, "queued_at": now()}
        with contextlib.suppress(IllegalMove):  # it has ended meanwhile
            await self._store.move(record.owner, record.id, JobStatus.QUEUED, due_s=due_s, **back)

    def _expiry_error(self, record: JobRecord) -> ErrorInfo | None:
        at = now()
        if record.expires_at is not None and at >= record.expires_at:
            seconds = record.expires_at - record.created_at
            return DeadlineExceeded(f"the job had not ended {seconds:g} s after it was submitted (its timeout)").info
        if record.status is JobStatus.QUEUED and at >= queue_deadline(record):
            return DeadlineExceeded(
                f"no worker took the job within {record.queue_s:g} s (queue limit)", code="queue_timeout"
            ).info
        return None
