"""Submits, awaits and cancels the jobs of a batch's lines. An outage delays lines but never fails them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from backbone.bus.blobs import BlobStore
from backbone.bus.job_log import OutcomeStore
from backbone.retry import Backoff, retry
from backbone.store.byte_quotas import ByteQuotas
from backbone.team_keys import TeamKeys
from gateway import clock
from gateway.auth.authenticator import Principal
from gateway.batches.input_file import BatchLineRequest, InputLine, job_id, parse_line, request_ids
from gateway.batches.line_results import LineResults
from gateway.batches.line_types import LineType
from gateway.batches.repository import BatchRepository
from gateway.files import FileStore, StorageFull
from gateway.http.inference_body import InferenceBodyReader
from gateway.jobs.api import JobNotFound, JobsApi, Submission
from gateway.jobs.storage_quotas import ended_job_bytes
from gateway.limits.effective import EffectiveLimits
from schemas.batches import Batch
from schemas.errors import ErrorInfo, NexusError, Unavailable
from schemas.jobs import TERMINAL_STATUSES, JobStatus, Lane
from schemas.outcome import Outcome

T = TypeVar("T")

RETRY_DELAY_S = 2.0
"""The delay before a retry after an outage or a full queue."""
OUTCOME_WAIT_S = 60.0
"""The timeout of one wait for a job's outcome. The wait is repeated."""
BLOB_MARGIN_S = 3600.0
"""The time by which a line's blob outlives the batch's window."""
EXPIRY_MARGIN_S = 60.0
"""The time after the end of the window at which a job expires, in case no gateway runs its batch."""
ROOM_WAIT_S = 300.0
"""The time after which lines no longer wait for other batches of the team to make room for their results."""
TRANSIENT_STATUSES = frozenset({429, 503})
"""The statuses of errors that are worth a retry."""


class BatchSignals:
    """Signals that all lines of a batch share: stop, and progress of any line."""

    def __init__(self) -> None:
        self._stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._moved = asyncio.Event()

    @property
    def stopped(self) -> bool:
        """Return whether the batch stops: no new lines start, and jobs in progress are cancelled."""
        return self._stop.done()

    def stop(self) -> None:
        """Stop the batch."""
        if not self._stop.done():
            self._stop.set_result(None)
        self.notify_progress()

    def notify_progress(self) -> None:
        """Notify waiting lines that a line has ended."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def wait_for_progress(self, seconds: float) -> None:
        """Wait until a line ends, the batch stops or the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._moved.wait()

    async def run_until_stopped(self, work: asyncio.Future[Any]) -> None:
        """Await `work` until it is done or the batch stops. In the latter case cancel it; it may have been done all the same."""
        try:
            both: set[asyncio.Future[Any]] = {work, self._stop}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError, NexusError):
                await work


class LineJobRunner:
    """Runs the jobs of one batch."""

    def __init__(self, batch: Batch, dependencies: BatchDependencies, signals: BatchSignals) -> None:
        keep_s = max(0.0, batch.expires_at - clock.now()) + BLOB_MARGIN_S
        self.results = LineResults(dependencies.results, batch.owner, batch.id, keep_s)
        self._batch = batch
        self._dependencies = dependencies
        self._signals = signals
        self._kind = dependencies.line_types[batch.endpoint]
        self._reader = dependencies.reader.with_blob_ttl(keep_s)

    async def read_status(self, job: str) -> JobStatus | None:
        """Return the final status of a job of an earlier run of the batch, or None if it has not ended."""
        stored = await _retry(lambda: self._dependencies.log.read_outcome(job))
        if stored is None:
            return None
        self.results.end_line(ended_job_bytes(stored.outcome, len(stored.payload)))
        return stored.outcome.status

    async def wait_for_room(self) -> ErrorInfo | None:
        """Wait until the team's limit leaves room for the result of one more line: other lines or batches may end.

        Return the error of the line if there will be none, or if the batch stops.
        """
        most = self._dependencies.limits(self._batch.key).result_bytes
        while not await self.results.begin_line(most):
            if self._signals.stopped or (not self.results.open and await self._is_without_prospect()):
                self.results.open += 1
                return StorageFull(
                    f"The results of your team's unfinished batches would take more than {most} bytes, its limit. Send this request "
                    "again in a smaller batch, or when others have ended."
                ).info
            await self._signals.wait_for_progress(RETRY_DELAY_S)
        return None

    async def _is_without_prospect(self) -> bool:
        """Return whether no other batch of the team will make room, or none has for long."""
        full_since = self.results.full_since
        if full_since is not None and monotonic() - full_since > ROOM_WAIT_S:
            return True
        return await _retry(lambda: self._dependencies.repository.has_room(self._batch.owner, 1))

    async def submit(self, line: InputLine, refusal: ErrorInfo | None) -> bool:
        """Submit a line's job. An invalid request, or one with a `refusal`, fails its job immediately. Return False if the batch stopped
        before.
        """
        job = job_id(self._batch.id, line.number)
        request = parse_line(line.data, self._batch.endpoint)
        if refusal is not None and not self._signals.stopped:
            await self._reject(job, refusal, request)
            return True
        while not self._signals.stopped:
            try:
                await self._submit(job, request)
            except NexusError as error:
                if error.info.status not in TRANSIENT_STATUSES:
                    await self._reject(job, error.info, request)
                    return True
                await self._signals.wait_for_progress(min(RETRY_DELAY_S, error.info.retry_after_s or RETRY_DELAY_S))
            else:
                return True
        return False

    async def _submit(self, job: str, request: BatchLineRequest) -> None:
        owner, limits = self._batch.owner, self._dependencies.limits(self._batch.key)
        received = await self._kind.read(owner, request.body, self._reader.of(owner, limits.pending_bytes))
        submission = Submission(
            Principal(owner=owner, key_id=self._batch.key, limits=limits),
            self._kind.endpoint,
            received,
            request_ids(job)[1],
            lane=Lane.FLEX,
            metadata={"custom_id": request.custom_id},
            timeout_s=max(0.0, self._batch.expires_at - clock.now()) + EXPIRY_MARGIN_S,
            job_id=job,
            shown_endpoint=self._batch.endpoint,
            batch=self._batch.id,
        )
        try:
            await self._dependencies.jobs.submit(submission)
        except BaseException:
            await received.discard()
            raise

    async def wait(self, job: str) -> JobStatus:
        """Wait until the job has ended and return its status. Cancel it when the batch stops."""
        looked, size = False, 0

        async def wait() -> JobStatus:
            nonlocal looked, size
            async with self._dependencies.log.watch_outcome(job) as has_outcome:
                while (stored := await self._dependencies.log.read_outcome(job)) is None:
                    if looked and (status := await self._recorded_status(job)) is not None:
                        return status
                    looked = True
                    if self._signals.stopped:
                        await self.cancel(job)
                    else:
                        await self._signals.run_until_stopped(asyncio.ensure_future(has_outcome(OUTCOME_WAIT_S)))
                size = ended_job_bytes(stored.outcome, len(stored.payload))
                return stored.outcome.status

        try:
            return await _retry(wait)
        finally:
            self.results.end_line(size)

    async def _recorded_status(self, job: str) -> JobStatus | None:
        """Return the status of an ended job whose outcome is no longer stored."""
        with suppress(JobNotFound):
            record = await self._dependencies.jobs.get(self._batch.owner, job)
            return record.status if record.status in TERMINAL_STATUSES else None
        return None

    async def cancel(self, job: str) -> None:
        """Cancel the job unless it has ended. Raises Unavailable."""
        try:
            await self._dependencies.jobs.cancel(self._batch.owner, job)
        except JobNotFound:
            # Only the queue may hold the job. The attempt gate checks the outcome before it starts.
            await self._dependencies.log.store_outcome(self._gateway_outcome(job, JobStatus.CANCELLED))

    async def _reject(self, job: str, error: ErrorInfo, request: BatchLineRequest) -> None:
        model = request.body.get("model")
        outcome = self._gateway_outcome(job, JobStatus.FAILED).model_copy(
            update={
                "error": error,
                "metadata": {"custom_id": request.custom_id},
                "public_model": model[:256] if isinstance(model, str) else "",
            }
        )
        await _retry(lambda: self._dependencies.log.store_outcome(outcome))

    def _gateway_outcome(self, job: str, status: JobStatus) -> Outcome:
        """Return the outcome of a job that was never queued. It has no model."""
        return Outcome(
            job=job,
            status=status,
            owner=self._batch.owner,
            key=self._batch.key,
            endpoint=self._batch.endpoint,
            capability=self._kind.endpoint.capability,
            lane=Lane.FLEX,
            model="",
            public_model="",
            request_id=request_ids(job)[1],
            batch=self._batch.id,
        )


@dataclass(frozen=True, slots=True)
class BatchDependencies:
    """The collaborators of batches, and the limits that all batches share."""

    repository: BatchRepository
    files: FileStore
    blobs: BlobStore
    jobs: JobsApi
    log: OutcomeStore
    reader: InferenceBodyReader
    line_types: Mapping[str, LineType]
    """The line types by endpoint path."""
    window: int
    """The maximum number of unfinished jobs of one batch."""
    limits: Callable[[str], EffectiveLimits]
    """Returns the present limits of an API key, by its id."""
    results: ByteQuotas
    """Counts the results of unfinished batches."""
    team_keys: TeamKeys = field(default_factory=lambda: TeamKeys({}))
    large: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """Lets only one large line at a time into memory."""


async def _retry(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until NATS and the store are available."""
    return await retry(call, on=Unavailable, backoff=Backoff(RETRY_DELAY_S))
