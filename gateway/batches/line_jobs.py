"""The jobs of a batch's lines: submitted, waited for, cancelled. Whatever is away is waited for: no line fails for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from backbone.bus.blobs import BlobStore
from backbone.bus.job_log import JobLog
from gateway import clock
from gateway.auth.authenticator import Principal
from gateway.batches.input_file import InputLine, Request, job_id, parse_line, request_ids
from gateway.batches.line_types import LineType
from gateway.batches.repository import BatchRepository
from gateway.files import FileStore
from gateway.http.inference_body import InferenceBodyReader
from gateway.jobs.api import JobNotFound, JobsApi, Submission
from schemas.batches import Batch
from schemas.errors import ErrorInfo, NexusError, Unavailable
from schemas.jobs import TERMINAL_STATUSES, JobStatus, Lane
from schemas.outcome import Outcome

RETRY_DELAY_S = 2.0
"""After what is away, or full, for now."""
OUTCOME_WAIT_S = 60.0
"""A wait for the end of a job; then comes the next."""
BLOB_MARGIN_S = 3600.0
"""What a line sent by reference outlives the batch's window by."""
EXPIRY_MARGIN_S = 60.0
"""A job ends by itself when this has passed since the end of the window: its batch may have no runner then."""
TRANSIENT_STATUSES = frozenset({429, 503})
"""Statuses of refusals that do not last."""


class BatchSignals:
    """What a batch's lines wait for together."""

    def __init__(self) -> None:
        self._stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._moved = asyncio.Event()

    @property
    def stopped(self) -> bool:
        """No more lines are begun, and those under way are to end."""
        return self._stop.done()

    def stop(self) -> None:
        """From now on."""
        if not self._stop.done():
            self._stop.set_result(None)
        self.notify_progress()

    def notify_progress(self) -> None:
        """A line has ended: there may be room for another one."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def wait_for_progress(self, seconds: float) -> None:
        """Until a line ends, the batch stops, or the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._moved.wait()

    async def run_until_stopped(self, work: asyncio.Future[Any]) -> None:
        """Until `work` is done or the batch stops; then it is cancelled, and was perhaps done all the same."""
        try:
            both: set[asyncio.Future[Any]] = {work, self._stop}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError, NexusError):
                await work


class LineJobRunner:
    """Of one batch."""

    def __init__(self, batch: Batch, dependencies: BatchDependencies, signals: BatchSignals) -> None:
        self._batch = batch
        self._dependencies = dependencies
        self._signals = signals
        self._kind = dependencies.line_types[batch.endpoint]
        self._reader = dependencies.reader.with_blob_ttl(max(0.0, batch.expires_at - clock.now()) + BLOB_MARGIN_S)
        self._principal = Principal(
            owner=batch.owner, key_id=batch.key, max_queued=batch.max_queued, max_running=batch.max_running
        )

    async def read_status(self, job: str) -> JobStatus | None:
        """How it ended, if it has."""
        while True:
            try:
                stored = await self._dependencies.log.read_outcome(job)
            except Unavailable:
                await asyncio.sleep(RETRY_DELAY_S)
            else:
                return stored.outcome.status if stored is not None else None

    async def submit(self, line: InputLine) -> bool:
        """Submit a line's job, or end it at once where its request is wrong. False: the batch stops, and it was not submitted."""
        job = job_id(self._batch.id, line.number)
        request = parse_line(line.data, self._batch.endpoint)
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

    async def _submit(self, job: str, request: Request) -> None:
        received = await self._kind.read(self._batch.owner, request.body, self._reader)
        submission = Submission(
            self._principal,
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
        """Wait until the job is decided; when the batch stops, decide it."""
        looked = False
        while True:
            try:
                async with self._dependencies.log.watch_outcome(job) as has_outcome:
                    while (stored := await self._dependencies.log.read_outcome(job)) is None:
                        if looked and (status := await self._recorded_status(job)) is not None:
                            return status
                        looked = True
                        if self._signals.stopped:
                            await self.cancel(job)
                        else:
                            await self._signals.run_until_stopped(asyncio.ensure_future(has_outcome(OUTCOME_WAIT_S)))
                    return stored.outcome.status
            except Unavailable:
                await asyncio.sleep(RETRY_DELAY_S)

    async def _recorded_status(self, job: str) -> JobStatus | None:
        """How it ended, where what it ended with is not kept any more."""
        with suppress(JobNotFound):
            record = await self._dependencies.jobs.get(self._batch.owner, job)
            return record.status if record.status in TERMINAL_STATUSES else None
        return None

    async def cancel(self, job: str) -> None:
        """Decide that it was cancelled, unless it is decided already. Raises Unavailable."""
        try:
            await self._dependencies.jobs.cancel(self._batch.owner, job)
        except JobNotFound:
            # Nobody knows it but the queue: what takes it from there asks first.
            await self._dependencies.log.store_outcome(self._gateway_outcome(job, JobStatus.CANCELLED))

    async def _reject(self, job: str, error: ErrorInfo, request: Request) -> None:
        model = request.body.get("model")
        outcome = self._gateway_outcome(job, JobStatus.FAILED).model_copy(
            update={
                "error": error,
                "metadata": {"custom_id": request.custom_id},
                "public_model": model[:256] if isinstance(model, str) else "",
            }
        )
        while True:
            try:
                await self._dependencies.log.store_outcome(outcome)
            except Unavailable:
                await asyncio.sleep(RETRY_DELAY_S)
            else:
                return

    def _gateway_outcome(self, job: str, status: JobStatus) -> Outcome:
        """On a job that never was in a queue: it counts against no key, and is no model's."""
        return Outcome(
            job=job,
            status=status,
            owner=self._batch.owner,
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
    """The gateway's parts, and the bounds that its batches share."""

    repository: BatchRepository
    files: FileStore
    blobs: BlobStore
    jobs: JobsApi
    log: JobLog
    reader: InferenceBodyReader
    line_types: Mapping[str, LineType]
    """By the endpoint's path, as the batch and its lines name it."""
    window: int
    """Lines of one batch that are jobs at once."""
    large: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """One large line at a time is in memory."""
