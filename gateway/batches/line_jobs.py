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

AGAIN_S = 2.0
"""After what is away, or full, for now."""
LOOK_S = 60.0
"""A wait for the end of a job; then comes the next."""
MARGIN_S = 3600.0
"""What a line sent by reference outlives the batch's window by."""
FALLBACK_S = 60.0
"""A job ends by itself when this has passed since the end of the window: its batch may have no runner then."""
PASSING = frozenset({429, 503})
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
        self.move()

    def move(self) -> None:
        """A line has ended: there may be room for another one."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def pause(self, seconds: float) -> None:
        """Until a line ends, the batch stops, or the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._moved.wait()

    async def or_stop(self, work: asyncio.Future[Any]) -> None:
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

    def __init__(self, batch: Batch, tools: BatchDependencies, signals: BatchSignals) -> None:
        self._batch = batch
        self._tools = tools
        self._signals = signals
        self._kind = tools.line_types[batch.endpoint]
        self._reader = tools.reader.with_blob_ttl(max(0.0, batch.expires_at - clock.now()) + MARGIN_S)
        self._principal = Principal(
            owner=batch.owner, key_id=batch.key, max_queued=batch.max_queued, max_running=batch.max_running
        )

    async def decided(self, job: str) -> JobStatus | None:
        """How it ended, if it has."""
        while True:
            try:
                decision = await self._tools.log.read_outcome(job)
            except Unavailable:
                await asyncio.sleep(AGAIN_S)
            else:
                return decision.outcome.status if decision is not None else None

    async def begin(self, line: InputLine) -> bool:
        """Submit a line's job, or end it at once where its request is wrong. False: the batch stops, and it was not submitted."""
        job = job_id(self._batch.id, line.number)
        request = parse_line(line.data, self._batch.endpoint)
        while not self._signals.stopped:
            try:
                await self._submit(job, request)
            except NexusError as error:
                if error.info.status not in PASSING:
                    await self._refuse(job, error.info, request)
                    return True
                await self._signals.pause(min(AGAIN_S, error.info.retry_after_s or AGAIN_S))
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
            timeout_s=max(0.0, self._batch.expires_at - clock.now()) + FALLBACK_S,
            job_id=job,
            shown_endpoint=self._batch.endpoint,
            batch=self._batch.id,
        )
        try:
            await self._tools.jobs.submit(submission)
        except BaseException:
            await received.discard()
            raise

    async def end(self, job: str) -> JobStatus:
        """Wait until the job is decided; when the batch stops, decide it."""
        looked = False
        while True:
            try:
                async with self._tools.log.watch_outcome(job) as told:
                    while (decision := await self._tools.log.read_outcome(job)) is None:
                        if looked and (status := await self._recorded(job)) is not None:
                            return status
                        looked = True
                        if self._signals.stopped:
                            await self.cancel(job)
                        else:
                            await self._signals.or_stop(asyncio.ensure_future(told(LOOK_S)))
                    return decision.outcome.status
            except Unavailable:
                await asyncio.sleep(AGAIN_S)

    async def _recorded(self, job: str) -> JobStatus | None:
        """How it ended, where what it ended with is not kept any more."""
        with suppress(JobNotFound):
            record = await self._tools.jobs.get(self._batch.owner, job)
            return record.status if record.status in TERMINAL_STATUSES else None
        return None

    async def cancel(self, job: str) -> None:
        """Decide that it was cancelled, unless it is decided already. Raises Unavailable."""
        try:
            await self._tools.jobs.cancel(self._batch.owner, job)
        except JobNotFound:
            # Nobody knows it but the queue: what takes it from there asks first.
            await self._tools.log.store_outcome(self._word(job, JobStatus.CANCELLED))

    async def _refuse(self, job: str, error: ErrorInfo, request: Request) -> None:
        model = request.body.get("model")
        word = self._word(job, JobStatus.FAILED).model_copy(
            update={
                "error": error,
                "metadata": {"custom_id": request.custom_id},
                "public_model": model[:256] if isinstance(model, str) else "",
            }
        )
        while True:
            try:
                await self._tools.log.store_outcome(word)
            except Unavailable:
                await asyncio.sleep(AGAIN_S)
            else:
                return

    def _word(self, job: str, status: JobStatus) -> Outcome:
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
