"""Writes the output files of a batch in one pass over its input."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from backbone.bus.blobs import BlobCorrupted, BlobNotFound
from gateway import clock
from gateway.batches.input_file import InputLine, job_id, parse_line
from gateway.batches.line_jobs import BatchDependencies, LineJobRunner
from gateway.batches.output_file import LineWriter, OutputFile, check_blob
from gateway.jobs.api import JobNotFound, JobResult, ResultNotReady
from gateway.jobs.http_response import result_error
from schemas.batches import Batch, BatchStatus, BatchUsage, RequestCounts
from schemas.errors import BackendFailed, NotFound
from schemas.jobs import JobStatus

MAX_RESULTS_AHEAD = 16
"""The maximum number of results that are read ahead of the writer."""

UNFINISHED_MESSAGES = {
    "batch_cancelled": "This request was not completed before the batch was cancelled.",
    "batch_expired": "This request could not be executed before the completion window expired.",
    "job_cancelled": "The job of this request was cancelled.",
    "job_expired": "The job of this request expired before it was completed.",
    "result_gone": "The result of this request has been deleted after its retention time.",
}
"""The error messages of lines without a response, by code."""
ENDED_WITH_BATCH = frozenset({"batch_cancelled", "batch_expired"})


@dataclass(frozen=True, slots=True)
class FinalizedBatch:
    """The final status of a batch and its files."""

    status: BatchStatus
    counts: RequestCounts
    tokens: BatchUsage
    output_file_id: str | None
    error_file_id: str | None
    unfinished: int
    """The number of requests that did not run to their end because the batch did not."""


@dataclass(frozen=True, slots=True)
class _LineOutcome:
    """The outcome of one line."""

    custom_id: str
    job: str
    context: Any
    """The parts of the request that its response needs."""
    result: JobResult | None
    """The job's result. None if the job is unknown or no longer stored."""


class BatchFinalizer:
    """Finalizes one batch whose lines are all submitted."""

    def __init__(self, batch: Batch, dependencies: BatchDependencies, jobs: LineJobRunner) -> None:
        """Create a finalizer. `batch.reserved` must hold the ids of the output files."""
        assert batch.reserved is not None
        self._batch = batch
        self._dependencies = dependencies
        self._jobs = jobs
        self._kind = dependencies.line_types[batch.endpoint]
        self._writer = LineWriter()
        self._output = OutputFile(dependencies.files, batch, batch.reserved[0], "output")
        self._errors = OutputFile(dependencies.files, batch, batch.reserved[1], "error")
        self._no_more_results = batch.status is BatchStatus.CANCELLING or clock.now() >= batch.expires_at
        """Whether jobs that have not ended are to be cancelled."""
        self._expired = False
        self._unfinished = 0
        self._tokens = BatchUsage()

    async def write(self, lines: AsyncIterator[InputLine]) -> FinalizedBatch:
        """Write both files and publish them. Raises Unavailable and the errors of `lines`; the files are then discarded."""
        try:
            async with aclosing(in_order(lines, self._read_line_outcome, MAX_RESULTS_AHEAD)) as ends:
                async for ended in ends:
                    await self._write(ended)
            output_id, error_id = await self._output.publish(), await self._errors.publish()
        except BaseException:
            await self._output.discard()
            await self._errors.discard()
            raise
        done, failed = self._output.lines, self._errors.lines
        counts = RequestCounts(total=done + failed, completed=done, failed=failed)
        return FinalizedBatch(self._status(), counts, self._tokens, output_id, error_id, self._unfinished)

    def _status(self) -> BatchStatus:
        if self._batch.status is BatchStatus.CANCELLING:
            return BatchStatus.CANCELLED
        return BatchStatus.EXPIRED if self._expired else BatchStatus.COMPLETED

    async def _read_line_outcome(self, line: InputLine) -> _LineOutcome:
        request, job = parse_line(line.data, self._batch.endpoint), job_id(self._batch.id, line.number)
        del line
        try:
            result = await self._result(job)
        except NotFound:
            return _LineOutcome(request.custom_id, job, None, None)
        answered = result.outcome.status is JobStatus.COMPLETED
        context = self._kind.context(request.body, job) if answered else None
        return _LineOutcome(request.custom_id, job, context, result)

    async def _result(self, job: str) -> JobResult:
        owner, jobs = self._batch.owner, self._dependencies.jobs
        try:
            return await jobs.result(owner, job)
        except JobNotFound:
            raise
        except ResultNotReady:
            if not self._no_more_results:
                raise
        # A gateway that no longer runs submitted the job.
        await self._jobs.cancel(job)
        return await jobs.result(owner, job)

    async def _write(self, ended: _LineOutcome) -> None:
        result = ended.result
        if result is not None and result.outcome.status is JobStatus.COMPLETED:
            await self._answer(ended, result)
        elif (
            result is not None
            and result.outcome.status is JobStatus.FAILED
            and (error := result_error(result)) is not None
        ):
            await self._writer.failure(self._errors, ended.custom_id, result.outcome, error)
        else:
            await self._unanswered(ended, self._unfinished_code(result))

    async def _answer(self, ended: _LineOutcome, result: JobResult) -> None:
        try:
            await check_blob(self._dependencies.blobs, result)
            payload = await self._kind.answer(ended.context, result, self._batch.base_url)
        except (BlobNotFound, BlobCorrupted):
            await self._unanswered(ended, "result_gone")
        except BackendFailed as error:
            await self._writer.failure(self._errors, ended.custom_id, result.outcome, error.info)
        else:
            await self._writer.answer(self._output, ended.custom_id, result.outcome, payload)
            self._tokens = _add_usage(self._tokens, result)

    def _unfinished_code(self, result: JobResult | None) -> str:
        if self._batch.status is BatchStatus.CANCELLING:
            return "batch_cancelled"
        if self._no_more_results:
            self._expired = True
            return "batch_expired"
        if result is None:
            return "result_gone"
        return "job_cancelled" if result.outcome.status is JobStatus.CANCELLED else "job_expired"

    async def _unanswered(self, ended: _LineOutcome, code: str) -> None:
        self._unfinished += code in ENDED_WITH_BATCH
        await self._writer.unanswered(self._errors, ended.custom_id, ended.job, code, UNFINISHED_MESSAGES[code])


def _add_usage(tokens: BatchUsage, result: JobResult) -> BatchUsage:
    usage = result.outcome.usage
    if usage is None:
        return tokens
    extra: dict[str, Any] = usage.model_extra or {}
    return tokens.add(
        usage.prompt_tokens,
        _detail(extra.get("prompt_tokens_details"), "cached_tokens"),
        usage.completion_tokens,
        _detail(extra.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _detail(details: Any, name: str) -> int:
    value = details.get(name) if isinstance(details, dict) else None
    return value if isinstance(value, int) else 0


T = TypeVar("T")
R = TypeVar("R")


async def in_order(
    things: AsyncIterator[T], work: Callable[[T], Awaitable[R]], at_once: int
) -> AsyncGenerator[R, None]:
    """Yield the results of `work` in the order of `things`, with at most `at_once` in progress. Raises their errors."""
    under_way: deque[asyncio.Future[R]] = deque()
    try:
        async for thing in things:
            under_way.append(asyncio.ensure_future(work(thing)))
            if len(under_way) >= at_once:
                yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        for future in under_way:
            future.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await future
