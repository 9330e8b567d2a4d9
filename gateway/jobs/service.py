"""The implementation of `gateway.jobs.api.JobsApi`, which documents the guarantees."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from backbone.bus.blobs import BlobStore
from backbone.bus.bus import Queue
from backbone.bus.job_log import JobLog, StoredDeadLetter, StoredOutcome
from backbone.store.store import IllegalMove, Store
from gateway.jobs.api import JobEvent, JobNotFailed, JobNotFound, JobResult, ResultNotReady, Submission
from gateway.jobs.attempts import with_attempt_count
from gateway.jobs.content_retention import ContentRetention
from gateway.jobs.estimator import EtaEstimator
from gateway.jobs.event_stream import JobEventStream, parse_after
from gateway.jobs.lane_change import LaneChanger
from gateway.jobs.record_recovery import read_logged_record
from gateway.jobs.records import new_record, now, record_from_outcome, seconds_until_due, with_outcome
from gateway.jobs.stored_input import read_input
from gateway.jobs.submitter import JobSubmitter
from gateway.jobs.terminator import JobTerminator
from gateway.jobs.usage import OutcomeUsage
from schemas.errors import NexusError, NotFound, Unavailable
from schemas.jobs import TERMINAL_STATUSES, Envelope, JobRecord, JobStatus, Lane, WebhookState
from schemas.outcome import Outcome

JOB_ID = re.compile(r"job_[0-9a-f]{32}")


class JobService:
    """Implements `gateway.jobs.api.JobsApi` on the job log and the record store."""

    def __init__(
        self,
        jobs: JobLog,
        store: Store,
        blobs: BlobStore,
        submitter: JobSubmitter,
        terminator: JobTerminator,
        estimator: EtaEstimator,
        lanes: LaneChanger,
        *,
        keep_s: float,
        usage: OutcomeUsage | None = None,
        content: ContentRetention | None = None,
    ) -> None:
        """Build the service. `usage`: None without a ledger; `content`: None where no job is sealed."""
        self._content = content
        self._log = jobs
        self._store = store
        self._blobs = blobs
        self._submitter = submitter
        self._terminator = terminator
        self._estimator = estimator
        self._lanes = lanes
        self._keep_s = keep_s
        self._usage = usage

    async def submit(self, submission: Submission) -> JobRecord:
        """See `JobsApi`."""
        return await self._submitter.submit(submission)

    async def get(self, owner: str, job_id: str) -> JobRecord:
        """See `JobsApi`."""
        _check_id(job_id)
        record = await self._store.get(owner, job_id) or await read_logged_record(self._log, job_id)
        if record is None or record.owner != owner:
            raise JobNotFound(f"Job '{job_id}' does not exist. `GET /v1/jobs` lists your jobs.")
        if record.status not in TERMINAL_STATUSES:
            stored = await self._log.read_outcome(job_id)
            if stored is not None and stored.outcome.run >= record.run:
                return with_outcome(record, await with_attempt_count(self._log, stored.outcome), stored.stored_at)
        return record

    async def wait(self, owner: str, job_id: str, seconds: float) -> JobRecord:
        """See `JobsApi`."""
        _check_id(job_id)
        async with self._log.watch_outcome(job_id) as has_outcome:
            record = await self.get(owner, job_id)
            if record.status in TERMINAL_STATUSES or not await has_outcome(seconds):
                return record
            stored = await self._log.read_outcome(job_id)
            if stored is not None and stored.outcome.run >= record.run:
                return with_outcome(record, await with_attempt_count(self._log, stored.outcome), stored.stored_at)
        return await self.get(owner, job_id)

    async def wait_for_result(self, owner: str, job_id: str, seconds: float) -> JobResult | None:
        """See `JobsApi`."""
        _check_id(job_id)
        async with self._log.watch_outcome(job_id) as has_outcome:
            stored = await self._log.read_outcome(job_id)
            if stored is None and await has_outcome(seconds):
                stored = await self._log.read_outcome(job_id)
        if stored is None:
            return None
        if stored.outcome.owner != owner:
            raise JobNotFound(f"Job '{job_id}' does not exist. `GET /v1/jobs` lists your jobs.")
        _require_content(stored)
        return _to_result(stored)

    async def result(self, owner: str, job_id: str) -> JobResult:
        """See `JobsApi`."""
        _check_id(job_id)
        stored = await self._log.read_outcome(job_id)
        if stored is None or stored.outcome.owner != owner:
            record = await self.get(owner, job_id)
            if record.status in TERMINAL_STATUSES:
                raise NotFound(
                    "The result of this job has been deleted after its retention time. Submit the request again.",
                    code="result_expired",
                )
            raise ResultNotReady(
                f"The job is {record.status} and has no result yet. Retry later, or wait with `GET /v1/jobs/{job_id}?wait=SECONDS`."
            )
        _require_content(stored)
        return _to_result(stored)

    async def input(self, owner: str, job_id: str) -> object:
        """See `JobsApi`."""
        return await read_input(self._log, await self.get(owner, job_id))

    async def confirm_delivery(self, outcome: Outcome) -> None:
        """See `JobsApi`."""
        if outcome.sealed and self._content is not None:
            with contextlib.suppress(Unavailable):  # its time ends all the same
                await self._content.confirm_delivery(outcome.job)

    async def follow(self, owner: str, job_id: str, after: str = "") -> AsyncGenerator[JobEvent, None]:
        """See `JobsApi`."""
        parse_after(after)
        record = await self.get(owner, job_id)
        async with aclosing(JobEventStream(self._log, self._blobs, record, after).events()) as events:
            async for event in events:
                if event is not None:
                    yield event

    async def follow_all_attempts(self, owner: str, job_id: str) -> AsyncGenerator[JobEvent | None, None]:
        """See `JobsApi`."""
        record = await self.get(owner, job_id)
        async with aclosing(JobEventStream(self._log, self._blobs, record, "", all_attempts=True).events()) as events:
            async for event in events:
                yield event

    async def cancel(self, owner: str, job_id: str) -> JobRecord:
        """See `JobsApi`."""
        record = await self.get(owner, job_id)
        if record.status not in TERMINAL_STATUSES:
            await self._terminator.terminate(record, JobStatus.CANCELLED)
        return await self.get(owner, job_id)

    async def estimate(self, record: JobRecord) -> tuple[int | None, float | None]:
        """See `JobsApi`."""
        if record.status in TERMINAL_STATUSES:
            return None, None
        position = None
        if record.status is JobStatus.QUEUED:
            seq = await self._terminator.queue_sequence(record)
            if seq is not None:
                position = await self._log.queue_position(Queue(record.capability, record.lane, record.model), seq)
        return position, await self._estimator.eta_s(record, position)

    async def change_lane(self, owner: str, job_id: str, lane: Lane) -> JobRecord:
        """See `JobsApi`."""
        return await self._lanes.change(await self.get(owner, job_id), lane)

    # Retries

    async def retry(self, owner: str, job_id: str) -> JobRecord:
        """See `JobsApi`."""
        record = await self.get(owner, job_id)
        stored = await self._log.read_outcome(job_id)
        _require_retryable(record, stored)
        if stored is None or stored.is_forgotten or not stored.payload:
            raise JobNotFailed(
                "The request of this job has been deleted after its retention time. Submit the request again as a new job."
            )
        started = await self._start_run(record, stored.payload, stored.outcome, stored)
        if stored.outcome.dead and (letter := await self._log.find_dead_letter(job_id)) is not None:
            await self._log.delete_dead_letter(letter.seq)
        return started

    async def _start_run(
        self, record: JobRecord, message: bytes, outcome: Outcome, stored: StoredOutcome | None
    ) -> JobRecord:
        """Start a new run of a failed job.

        Args:
            record: The job's record.
            message: The job message of the last run.
            outcome: The outcome of the last run.
            stored: The stored outcome to delete, so that the new run can end. None if none is stored.
        """
        envelope, body = Envelope.decode(message)
        new = record
        if record.status is JobStatus.FAILED:
            new = await self._create_run_record(record, envelope.model_copy(update={"run": record.run + 1}))
        try:
            new = await self._submitter.resubmit(envelope.model_copy(update={"run": new.run}), body, new)
        except NexusError:
            # The run is not queued, so the job stays failed and can be retried. Its webhook was already sent for the last run.
            failed = outcome.model_copy(update={"run": new.run, "webhook": ""})
            with contextlib.suppress(NexusError):
                await self._terminator.store_outcome(failed, message)
            raise
        if stored is not None:
            if self._usage is not None:  # the outcome may be deleted before it is recorded
                await self._usage.store(stored.outcome, stored.stored_at)
            await self._log.delete_outcome(record.job, stored.seq)
        return new

    async def _create_run_record(self, record: JobRecord, envelope: Envelope) -> JobRecord:
        """Store the record of a new run. Raises JobNotFailed if another retry was faster."""
        timeout_s = None if record.expires_at is None else record.expires_at - record.created_at
        changes: dict[str, Any] = {  # the store resets the other fields of a run itself
            "run": envelope.run,
            "queued_at": now(),
            "expires_at": None if timeout_s is None else now() + timeout_s,
            "webhook_state": WebhookState(url=record.webhook) if record.webhook else None,
        }
        due_s = seconds_until_due(
            record.model_copy(update={"expires_at": changes["expires_at"]}), JobStatus.QUEUED, 0.0
        )
        try:
            new = await self._store.move(record.owner, record.job, JobStatus.QUEUED, due_s=due_s, **changes)
        except IllegalMove:
            raise JobNotFailed(
                "Another retry of this job is already in progress. Check its state with `GET /v1/jobs/{id}`."
            ) from None
        if new is None:
            new = new_record(envelope, queue_s=record.queue_s, expires_at=None)
            await self._store.create(new, ttl_s=self._keep_s, due_s=due_s)
        return new

    # Dead letters of all owners

    async def dead_letters(self, *, before: int | None, limit: int) -> list[StoredDeadLetter]:
        """See `JobsApi`."""
        return await self._log.list_dead_letters(before=before, limit=limit)

    async def dead_letter(self, job_id: str) -> StoredDeadLetter:
        """See `JobsApi`."""
        _check_id(job_id)
        letter = await self._log.find_dead_letter(job_id)
        if letter is None:
            raise NotFound(
                f"Job '{job_id}' has no dead letter. `GET /v1/dlq` lists all dead letters.",
                code="dead_letter_not_found",
            )
        return letter

    async def replay(self, job_id: str) -> JobRecord:
        """See `JobsApi`."""
        return await self.replay_letter(await self.dead_letter(job_id))

    async def replay_letter(self, letter: StoredDeadLetter) -> JobRecord:
        """See `JobsApi`."""
        job_id = letter.outcome.job
        record = await self._get_or(letter.outcome.owner, job_id, record_from_outcome(letter.outcome, letter.stored_at))
        stored = await self._log.read_outcome(job_id)
        _require_retryable(record, stored)
        if letter.outcome.sealed and (stored is None or stored.is_forgotten):
            raise JobNotFailed("The request of this job was deleted when it ended. Submit it again as a new job.")
        if not letter.message:
            raise JobNotFailed(
                "The request of this job was too large to store with its dead letter. Submit the request again as a new job."
            )
        started = await self._start_run(record, letter.message, letter.outcome, stored)
        await self._log.delete_dead_letter(letter.seq)
        return started

    async def delete_letter(self, letter: StoredDeadLetter) -> None:
        """See `JobsApi`."""
        await self._log.delete_dead_letter(letter.seq)

    async def delete_dead_letters(self, job_id: str) -> None:
        """See `JobsApi`."""
        letter: StoredDeadLetter | None = await self.dead_letter(job_id)
        while letter is not None:
            await self._log.delete_dead_letter(letter.seq)
            letter = await self._log.find_dead_letter(job_id)

    async def _get_or(self, owner: str, job_id: str, otherwise: JobRecord) -> JobRecord:
        """Return the job's record, or `otherwise` if it has none."""
        try:
            return await self.get(owner, job_id)
        except JobNotFound:
            return otherwise


def _check_id(job_id: str) -> None:
    """Check an id before it becomes part of a NATS subject. Raises JobNotFound."""
    if JOB_ID.fullmatch(job_id) is None:
        raise JobNotFound(f"Job '{job_id[:100]}' does not exist. `GET /v1/jobs` lists your jobs.")


def _require_retryable(record: JobRecord, stored: StoredOutcome | None) -> None:
    """Check that a job can be retried. A retry that its gateway did not finish can be repeated. Raises JobNotFailed."""
    half_way = record.status is JobStatus.QUEUED and stored is not None and stored.outcome.run < record.run
    if record.status is not JobStatus.FAILED and not half_way:
        raise JobNotFailed(f"Only a failed job can be retried. This job is {record.status}.")


def _require_content(stored: StoredOutcome) -> None:
    """Check that the result can still be read. Raises NotFound."""
    if stored.is_forgotten and stored.outcome.status is JobStatus.COMPLETED:
        raise NotFound(
            "The result of this job was deleted after its delivery, or since nobody fetched it in time (`retain: none`). Submit the request again.",
            code="result_expired",
        )


def _to_result(stored: StoredOutcome) -> JobResult:
    outcome = stored.outcome
    data = stored.payload if outcome.status is JobStatus.COMPLETED else b""
    return JobResult(outcome, data, outcome.blob, outcome.content_type)
