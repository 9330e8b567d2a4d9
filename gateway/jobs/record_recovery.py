"""Recovers job records from NATS after Redis has lost its data.

A request for a single job is answered from NATS. A list of jobs needs the records in Redis, so a marker in Redis says that they
are complete. If the marker is missing, one gateway recovers all missing records and then sets it.
"""

from __future__ import annotations

import asyncio

import structlog

from backbone.bus.job_log import JobHistory
from backbone.clock import now
from backbone.ids import new_token
from backbone.store.documents import DocumentStore
from backbone.store.store import Store
from gateway.jobs.attempts import with_attempt_count
from gateway.jobs.content_retention import UNFETCHED_RESULT_S
from gateway.jobs.records import record_from_outcome, seconds_until_due, with_outcome
from gateway.jobs.terminator import read_initial_record
from schemas.errors import NexusError
from schemas.jobs import TERMINAL_STATUSES, JobRecord, JobStatus

log = structlog.get_logger(__name__)

POLL_INTERVAL_S = 2.0
BATCH_SIZE = 32
LEASE_S = 30.0
"""The lease for one batch. If its gateway dies, another gateway takes over after this time."""
MARKER_KIND, MARKER_OWNER, MARKER_ID = "system", "nexus", "records-whole"
LEASE_NAME = "rebuilding"


class RecordRecovery:
    """Recovers missing records. All gateways poll; the lease lets one of them work."""

    def __init__(self, jobs: JobHistory, store: Store, documents: DocumentStore, *, keep_s: float) -> None:
        self._log = jobs
        self._store = store
        self._documents = documents
        self._keep_s = keep_s
        self._token = new_token()

    async def run(self) -> None:
        """Check for the marker until cancelled, and recover records if it is missing."""
        while True:
            try:
                if await self._documents.get(MARKER_KIND, MARKER_OWNER, MARKER_ID) is None:
                    await self._recover_all()
            except NexusError as error:
                log.debug("records.recovery_unavailable", error=error.info.message)
            except Exception:
                log.exception("records.recovery_defect")
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _recover_all(self) -> None:
        made = 0
        jobs = await self._log.list_jobs()
        for start in range(0, len(jobs), BATCH_SIZE):
            if not await self._store.acquire_lease(LEASE_NAME, self._token, LEASE_S):
                return  # another gateway is recovering them
            made += sum(await asyncio.gather(*(self._recover(job) for job in jobs[start : start + BATCH_SIZE])))
        await self._documents.put(MARKER_KIND, MARKER_OWNER, MARKER_ID, b"{}")
        await self._store.release_lease(LEASE_NAME, self._token)
        if made:
            log.warning("records.recovered", jobs=made)

    async def _recover(self, job: str) -> bool:
        """Create the record of one job unless it exists. An existing record is newer than the log's data."""
        record = await read_logged_record(self._log, job)
        if record is None:
            return False
        age_s = now() - (record.finished_at or record.created_at)
        due_s = seconds_until_due(record, JobStatus.QUEUED, 0.0)
        if record.status in TERMINAL_STATUSES:
            due_s = max(0.0, UNFETCHED_RESULT_S - age_s)  # of a sealed job's content; others have no timer
        return await self._store.create(record, ttl_s=max(1.0, self._keep_s - age_s), due_s=due_s)


async def read_logged_record(log: JobHistory, job: str) -> JobRecord | None:
    """Return the record of a job according to NATS, or None if NATS holds too little. Raises Unavailable."""
    record, stored = await asyncio.gather(read_initial_record(log, job), log.read_outcome(job))
    if stored is None:
        return record
    outcome = await with_attempt_count(log, stored.outcome)
    if record is None or record.owner != outcome.owner:
        return record_from_outcome(outcome, stored.stored_at)
    return with_outcome(record, outcome, stored.stored_at)
