"""One batch, run by one gateway: its phases, and the lines that are under way.

Nothing of it is lost with the gateway. A line's job has always the same id, so that whoever takes the batch over begins with the first
line again: what is decided costs a look, what is under way is waited for, and what was never submitted is submitted.

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
from gateway.batches.finalizer import Finalizer
from gateway.batches.input_file import InputLine, job_id, split_lines, validate
from gateway.batches.line_jobs import AGAIN_S, BatchDependencies, BatchSignals, LineJobRunner
from gateway.batches.repository import BatchNotFound
from gateway.files import new_file_id
from schemas.batches import Batch, BatchError, BatchStatus, RequestCounts
from schemas.errors import Unavailable
from schemas.jobs import JobStatus

log = structlog.get_logger(__name__)

TICK_S = 1.0
"""Between two looks at the batch's document, in which counts are written down too."""
SUBMITTERS = 16
"""Lines of one batch that are submitted at once, and so are in memory."""
LARGE = 1024 * 1024
"""Bytes above which a line waits until no other large one is in memory."""

VALIDATING, IN_PROGRESS, FINALIZING = BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING
FAILED, CANCELLING, CANCELLED = BatchStatus.FAILED, BatchStatus.CANCELLING, BatchStatus.CANCELLED
GONE = BatchError(
    code="input_file_gone", message="The input file was deleted, or its time ended, before the batch was done."
)


class Superseded(Exception):
    """Another gateway runs the batch now."""


class BatchExecutor:
    """See the module's docstring."""

    def __init__(self, tools: BatchDependencies, item: WorkItem) -> None:
        self._tools = tools
        self._item = item
        self._token = new_token()
        self._again = item.delivery > 1
        self._signals = BatchSignals()
        self._window = asyncio.Semaphore(tools.window)
        self._submitting = asyncio.Semaphore(SUBMITTERS)
        self._completed = self._failed = 0
        self._gone = False
        self._batch = Batch.model_validate_json(item.data)
        self._jobs = LineJobRunner(self._batch, tools, self._signals)

    async def go(self) -> Batch:
        """Run it to its end, in which nothing is left to be done. Raises Superseded, and Unavailable: begin again then."""
        await self._change(lambda batch: batch, claim=True)
        if self._batch.is_final:
            return self._batch
        work = asyncio.create_task(self._work())
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=TICK_S)
                self._item.extend()
                await self._tick()
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({work})
        await work
        return self._batch

    async def fail(self, error: BatchError) -> None:
        """End it without files. Raises Superseded and Unavailable."""
        await self._change(_failed(error))

    async def _tick(self) -> None:
        with suppress(Unavailable):
            await self._change(self._counted)
        if self._batch.status is CANCELLING or clock.now() >= self._batch.expires_at:
            self._signals.stop()

    def _counted(self, batch: Batch) -> Batch:
        """With what has been counted. A run that took over counts from nothing: what is shown never falls."""
        if batch.status not in (IN_PROGRESS, CANCELLING):
            return batch
        old = batch.counts
        completed, failed = max(old.completed, self._completed), max(old.failed, self._failed)
        if (completed, failed) == (old.completed, old.failed):
            return batch
        return _with(batch, counts=RequestCounts(total=old.total, completed=completed, failed=failed))

    async def _change(self, change: Callable[[Batch], Batch], *, claim: bool = False) -> None:
        """Change the document, as long as it is this run's. One that was lost is made again."""

        def ours(batch: Batch) -> Batch:
            if claim:
                return batch if batch.is_final else _with(batch, runner=self._token)
            if batch.runner != self._token:
                raise Superseded
            return change(batch)

        repository, owner, batch_id = self._tools.repository, self._batch.owner, self._batch.id
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
                await self._change(lambda batch: _with(batch, status=CANCELLED, cancelled_at=_now()))
            if self._batch.status is IN_PROGRESS:
                await self._run_lines()
            if self._gone:
                await self.fail(GONE)
            if self._batch.status in (FINALIZING, CANCELLING):
                await self._finalize()
        except (BlobNotFound, BlobCorrupted):
            await self.fail(GONE)

    async def _validate(self) -> None:
        async with aclosing(self._lines()) as lines:
            found = await validate(lines, self._batch.endpoint)

        def judged(batch: Batch) -> Batch:
            if batch.status is not VALIDATING:
                return batch
            batch = _with(batch, model=found.model, counts=RequestCounts(total=found.total))
            if found.errors:
                return _failed(*found.errors)(batch)
            return _with(batch, status=IN_PROGRESS, in_progress_at=_now())

        await self._change(judged)

    async def _finalize(self) -> None:
        def reserved(batch: Batch) -> Batch:
            return batch if batch.reserved else _with(batch, reserved=(new_file_id(), new_file_id()))

        await self._change(reserved)
        async with aclosing(self._lines()) as lines:
            finished = await Finalizer(self._batch, self._tools, self._jobs).write(lines)

        def ended(batch: Batch) -> Batch:
            status = CANCELLED if batch.status is CANCELLING else finished.status
            return _with(
                batch,
                status=status,
                counts=finished.counts,
                tokens=finished.tokens,
                output_file_id=finished.output_file_id,
                error_file_id=finished.error_file_id,
                **{f"{status.value}_at": _now()},
            )

        await self._change(ended)

    # Lines

    async def _lines(self) -> AsyncGenerator[InputLine, None]:
        """The input's lines, over outages. Raises BlobNotFound, BlobCorrupted, and LineTooLong where it was not validated."""
        read = 0
        while True:
            pieces = self._tools.blobs.read(self._batch.blob)
            try:
                async with aclosing(split_lines(pieces, self._tools.reader.max_bytes)) as lines:
                    async for line in lines:
                        if line.number > read:
                            read = line.number
                            yield line
                return
            except Unavailable:
                await asyncio.sleep(AGAIN_S)

    async def _run_lines(self) -> None:
        """Submit them one by one, and wait until all that were submitted are decided."""
        try:
            async with asyncio.TaskGroup() as group:
                await self._begin_lines(group)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors

        def run(batch: Batch) -> Batch:
            if batch.status is IN_PROGRESS and not self._gone:
                batch = _with(self._counted(batch), status=FINALIZING, finalizing_at=_now())
            return batch

        await self._change(run)

    async def _begin_lines(self, group: asyncio.TaskGroup) -> None:
        try:
            async with aclosing(self._lines()) as lines:
                async for line in lines:
                    large = [self._tools.large] if len(line.data) > LARGE else []
                    room = _Room(self._window, [self._submitting, *large])
                    if not await self._takes(room):
                        return
                    task = group.create_task(self._line(line, room))
                    task.add_done_callback(room.leave)
        except (BlobNotFound, BlobCorrupted):
            self._gone = True
            self._signals.stop()

    async def _takes(self, room: _Room) -> bool:
        """Wait until there is room. False: the batch stops."""
        try:
            await self._signals.or_stop(asyncio.ensure_future(room.take()))
        except BaseException:
            room.leave()
            raise
        if self._signals.stopped:
            room.leave()
        return not self._signals.stopped

    async def _line(self, line: InputLine, room: _Room) -> None:
        job = job_id(self._batch.id, line.number)
        status = await self._jobs.decided(job) if self._again else None
        begun = status is not None or await self._jobs.begin(line)
        del line
        room.forget()
        if not begun:
            return
        if status is None:
            status = await self._jobs.end(job)
        if status is JobStatus.COMPLETED:
            self._completed += 1
        else:
            self._failed += 1
        self._signals.move()


class _Room:
    """What a line takes: until its job has ended, and while it is in memory."""

    def __init__(self, window: asyncio.Semaphore, memory: list[asyncio.Semaphore]) -> None:
        self._wanted = [window, *memory]
        self._held: list[asyncio.Semaphore] = []

    async def take(self) -> None:
        """Wait for all of it."""
        for one in self._wanted:
            await one.acquire()
            self._held.append(one)

    def forget(self) -> None:
        """The line is not in memory any more."""
        while len(self._held) > 1:
            self._held.pop().release()

    def leave(self, _task: object = None) -> None:
        """Give everything back. Idempotent."""
        while self._held:
            self._held.pop().release()


def _with(batch: Batch, **changes: Any) -> Batch:
    return batch.model_copy(update=changes)


def _failed(*errors: BatchError) -> Callable[[Batch], Batch]:
    return lambda batch: _with(batch, status=FAILED, failed_at=_now(), errors=errors)


def _now() -> int:
    return int(clock.now())
