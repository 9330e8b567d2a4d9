"""Runs one batch on one gateway: its phases and the lines in progress.

Another gateway can take a batch over at any time. A line's job always has the same id, so the new gateway begins with the first
line again: it skips jobs that have ended, waits for jobs in progress, and submits jobs that were never submitted.

    validating → in_progress → finalizing → completed | expired
             ↘ failed       ↘ cancelling → cancelled
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

import structlog

from backbone.bus.blobs import BlobCorrupted, BlobNotFound
from backbone.bus.job_log import WorkItem
from backbone.ids import new_token
from gateway import clock
from gateway.batches.finalizer import BatchFinalizer
from gateway.batches.input_file import InputLine, job_id, split_lines, validate
from gateway.batches.line_jobs import RETRY_DELAY_S, BatchDependencies, BatchSignals, LineJobRunner
from gateway.batches.repository import BatchNotFound
from gateway.files import new_file_id
from schemas.batches import Batch, BatchError, BatchStatus, RequestCounts
from schemas.errors import ErrorInfo, Unavailable
from schemas.jobs import JobStatus

log = structlog.get_logger(__name__)

REFRESH_INTERVAL_S = 1.0
"""The interval at which the batch's document is read and its counts are written."""
MAX_SUBMISSIONS = 16
"""The maximum number of lines of one batch that are in memory for submission."""
LARGE_LINE_BYTES = 1024 * 1024
"""The size above which a line is large: only one large line at a time is in memory."""

VALIDATING, IN_PROGRESS, FINALIZING = BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING
FAILED, CANCELLING, CANCELLED = BatchStatus.FAILED, BatchStatus.CANCELLING, BatchStatus.CANCELLED
INPUT_FILE_MISSING = BatchError(
    code="input_file_gone",
    message="The input file was deleted or expired before the batch ended. Upload it again and create a new batch.",
)


class BatchSuperseded(Exception):
    """Another gateway has taken the batch over."""


class BatchExecutor:
    """Runs one batch from validation to its output files."""

    def __init__(self, dependencies: BatchDependencies, item: WorkItem) -> None:
        self._dependencies = dependencies
        self._item = item
        self._token = new_token()
        self._resumed = item.delivery > 1
        self._signals = BatchSignals()
        self._window = asyncio.Semaphore(dependencies.window)
        self._submitting = asyncio.Semaphore(MAX_SUBMISSIONS)
        self._completed = self._failed = 0
        self._input_missing = False
        self._batch = Batch.model_validate_json(dependencies.team_keys.open(f"batch {item.id}", item.data))
        self._jobs = LineJobRunner(self._batch, dependencies, self._signals)

    @property
    def owner(self) -> str:
        """The batch's owner."""
        return self._batch.owner

    async def run(self) -> Batch:
        """Run the batch to its end. Raises BatchSuperseded, and Unavailable if the run must be repeated."""
        await self._change(lambda batch: batch, claim=True)
        if self._batch.is_final:
            await self._jobs.results.release()
            return self._batch
        work = asyncio.create_task(self._work())
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=REFRESH_INTERVAL_S)
                self._item.extend()
                await self._refresh()
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({work})
        await work
        await self._jobs.results.release()
        return self._batch

    async def fail(self, error: BatchError) -> None:
        """End the batch as failed, without files. Raises BatchSuperseded, Unavailable."""
        await self._change(_failed(error))

    async def _refresh(self) -> None:
        with suppress(Unavailable):
            await self._change(self._with_counts)
        if self._batch.status is CANCELLING or clock.now() >= self._batch.expires_at:
            self._signals.stop()

    def _with_counts(self, batch: Batch) -> Batch:
        """Return the batch with current counts. After a takeover counting restarts at 0, so counts never decrease."""
        if batch.status not in (IN_PROGRESS, CANCELLING):
            return batch
        old = batch.counts
        completed, failed = max(old.completed, self._completed), max(old.failed, self._failed)
        if (completed, failed) == (old.completed, old.failed):
            return batch
        return _updated(batch, counts=RequestCounts(total=old.total, completed=completed, failed=failed))

    async def _change(self, change: Callable[[Batch], Batch], *, claim: bool = False) -> None:
        """Change the batch's document if this run owns it. Recreate a lost document. Raises BatchSuperseded, Unavailable."""

        def ours(batch: Batch) -> Batch:
            if claim:
                return batch if batch.is_final else _updated(batch, runner=self._token)
            if batch.runner != self._token:
                raise BatchSuperseded
            return change(batch)

        repository, owner, batch_id = self._dependencies.repository, self._batch.owner, self._batch.id
        try:
            self._batch = await repository.change(owner, batch_id, ours)
        except BatchNotFound:
            await repository.add(self._batch)
            self._batch = await repository.change(owner, batch_id, ours)

    # Phases

    async def _work(self) -> None:
        try:
            if self._batch.status is VALIDATING:
                await self._validate()
            if self._batch.status is CANCELLING and self._batch.in_progress_at is None:
                await self._change(lambda batch: _updated(batch, status=CANCELLED, cancelled_at=_now()))
            if self._batch.status is IN_PROGRESS:
                await self._run_lines()
            if self._input_missing:
                await self.fail(INPUT_FILE_MISSING)
            if self._batch.status in (FINALIZING, CANCELLING):
                await self._finalize()
        except (BlobNotFound, BlobCorrupted):
            await self.fail(INPUT_FILE_MISSING)

    async def _validate(self) -> None:
        async with aclosing(self._lines()) as lines:
            found = await validate(lines, self._batch.endpoint)

        def judged(batch: Batch) -> Batch:
            if batch.status is not VALIDATING:
                return batch
            batch = _updated(batch, model=found.model, counts=RequestCounts(total=found.total))
            if found.errors:
                return _failed(*found.errors)(batch)
            return _updated(batch, status=IN_PROGRESS, in_progress_at=_now())

        await self._change(judged)

    async def _finalize(self) -> None:
        def reserved(batch: Batch) -> Batch:
            return batch if batch.reserved else _updated(batch, reserved=(new_file_id(), new_file_id()))

        await self._change(reserved)
        async with aclosing(self._lines()) as lines:
            finished = await BatchFinalizer(self._batch, self._dependencies, self._jobs).write(lines)

        def ended(batch: Batch) -> Batch:
            status = CANCELLED if batch.status is CANCELLING else finished.status
            return _updated(
                batch,
                status=status,
                counts=finished.counts,
                tokens=finished.tokens,
                output_file_id=finished.output_file_id,
                error_file_id=finished.error_file_id,
                unfinished=finished.unfinished,
                **{f"{status.value}_at": _now()},
            )

        await self._change(ended)

    # Lines

    async def _lines(self) -> AsyncGenerator[InputLine, None]:
        """Yield the input's lines, across outages. Raises BlobNotFound, BlobCorrupted, and LineTooLong before validation."""
        read = 0
        while True:
            pieces = self._dependencies.blobs.read(self._batch.blob)
            try:
                async with aclosing(split_lines(pieces, self._dependencies.reader.max_bytes)) as lines:
                    async for line in lines:
                        if line.number > read:
                            read = line.number
                            yield line
                return
            except Unavailable:
                await asyncio.sleep(RETRY_DELAY_S)

    async def _run_lines(self) -> None:
        """Submit the lines' jobs and wait until all submitted jobs have ended."""
        try:
            async with asyncio.TaskGroup() as group:
                await self._submit_lines(group)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors

        def run(batch: Batch) -> Batch:
            if batch.status is IN_PROGRESS and not self._input_missing:
                batch = _updated(self._with_counts(batch), status=FINALIZING, finalizing_at=_now())
            return batch

        await self._change(run)

    async def _submit_lines(self, group: asyncio.TaskGroup) -> None:
        try:
            async with aclosing(self._lines()) as lines:
                async for line in lines:
                    refusal = await self._jobs.wait_for_room()
                    large = [self._dependencies.large] if len(line.data) > LARGE_LINE_BYTES else []
                    slot = _LineSlot(self._window, [self._submitting, *large])
                    if not await self._acquire_slot(slot):
                        return
                    task = group.create_task(self._run_line(line, slot, refusal))
                    task.add_done_callback(slot.release)
        except (BlobNotFound, BlobCorrupted):
            self._input_missing = True
            self._signals.stop()

    async def _acquire_slot(self, slot: _LineSlot) -> bool:
        """Wait for a free slot. Return False if the batch stops."""
        try:
            await self._signals.run_until_stopped(asyncio.ensure_future(slot.acquire()))
        except BaseException:
            slot.release()
            raise
        if self._signals.stopped:
            slot.release()
        return not self._signals.stopped

    async def _run_line(self, line: InputLine, slot: _LineSlot, refusal: ErrorInfo | None) -> None:
        job = job_id(self._batch.id, line.number)
        status = await self._jobs.read_status(job) if self._resumed else None
        submitted = status is not None or await self._jobs.submit(line, refusal)
        del line
        slot.release_memory()
        if not submitted:
            return
        if status is None:
            status = await self._jobs.wait(job)
        if status is JobStatus.COMPLETED:
            self._completed += 1
        else:
            self._failed += 1
        self._signals.notify_progress()


class _LineSlot:
    """The semaphores that a line holds: one until its job has ended, the others while it is in memory."""

    def __init__(self, window: asyncio.Semaphore, memory: list[asyncio.Semaphore]) -> None:
        self._wanted = [window, *memory]
        self._permits: list[asyncio.Semaphore] = []

    async def acquire(self) -> None:
        """Acquire all semaphores."""
        for one in self._wanted:
            await one.acquire()
            self._permits.append(one)

    def release_memory(self) -> None:
        """Release the semaphores of the line's memory."""
        while len(self._permits) > 1:
            self._permits.pop().release()

    def release(self, _task: object = None) -> None:
        """Release all semaphores. Idempotent."""
        while self._permits:
            self._permits.pop().release()


def _updated(batch: Batch, **changes: Any) -> Batch:
    return batch.model_copy(update=changes)


def _failed(*errors: BatchError) -> Callable[[Batch], Batch]:
    return lambda batch: _updated(batch, status=FAILED, failed_at=_now(), errors=errors)


def _now() -> int:
    return int(clock.now())
