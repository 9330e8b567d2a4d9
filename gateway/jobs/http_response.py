"""Answers of durable jobs over HTTP: the 202, the result when there is one, the stream as it is made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass
from typing import TypeVar

import orjson

from backbone.bus.blobs import BlobStore
from gateway.http.asgi import NO_STORE, STREAM_HEADERS, Headers, HttpExchange, Reply, adapted_header
from gateway.http.preferences import DeliveryPreferences
from gateway.jobs.api import JobEvent, JobResult, JobsApi
from gateway.jobs.records import job_object
from gateway.signed_urls import BLOB_URI_PREFIX, UrlSigner
from gateway.sse_frames import DONE, adapted_frame, comment_frame, error_frame, progress_frame
from schemas.errors import BackendFailed, DeadlineExceeded, ErrorInfo, InvalidRequest, NexusError
from schemas.frames import AdaptedParameters
from schemas.job_events import JobEventKind
from schemas.jobs import Capability, JobRecord, JobStatus, is_sse

T = TypeVar("T")

MAX_EVENTS_AHEAD = 256
"""Events that are read before they are taken."""
MAX_BYTES_AHEAD = 256 * 1024
"""Of those: who reads slowly, or not at all, costs no more than twice that. One event may go beyond it."""
REPORT_STEP_BYTES = 16 * 1024
"""Bytes by which they change before the connection is told."""
RESULT_WAIT_S = 300.0
"""How long one look at a job waits; then comes the next."""
URL_MARKER = BLOB_URI_PREFIX.encode()


def result_error(result: JobResult) -> ErrorInfo | None:
    """Why a job that has ended has no answer; None: it has one."""
    outcome = result.outcome
    if outcome.status is JobStatus.COMPLETED:
        return None
    if outcome.error is not None:
        return outcome.error
    if outcome.status is JobStatus.CANCELLED:
        return InvalidRequest("this job was cancelled", code="job_cancelled").info
    return DeadlineExceeded("this job has expired", code="job_expired").info


@dataclass(frozen=True, slots=True)
class ResultBody:
    """An answer, ready to be sent."""

    content_type: str
    size: int
    pieces: Callable[[], AsyncIterator[bytes]]


class JobResponder:
    """What is sent to callers about durable jobs."""

    def __init__(self, jobs: JobsApi, blobs: BlobStore, url_signer: UrlSigner, comment_after_s: float) -> None:
        self._jobs = jobs
        self._comment_after_s = comment_after_s
        self._blobs = blobs
        self._url_signer = url_signer

    async def send_accepted(
        self, reply: Reply, record: JobRecord, preferences: DeliveryPreferences | None = None
    ) -> None:
        """202: it will be answered later."""
        headers: Headers = [(b"location", f"/v1/jobs/{record.id}".encode())]
        if preferences is not None:
            headers += [(b"preference-applied", preferences.applied), (b"vary", b"prefer")]
        await reply.send_response(202, "application/json", orjson.dumps(job_object(record)), headers)

    async def wait_for_result(self, owner: str, job_id: str) -> JobResult:
        """How the job ended, once it has."""
        while (result := await self._jobs.wait_for_result(owner, job_id, RESULT_WAIT_S)) is None:
            pass
        return result

    def payload(self, result: JobResult, base: str) -> ResultBody:
        """The answer of a completed job. `base`: where the caller reached us, for URLs in it."""
        blob, data = result.blob, result.data
        end = DONE if is_sse(result.content_type) else b""
        if blob is None:
            if result.outcome.capability is Capability.IMAGES and URL_MARKER in data and not end:
                data = self._url_signer.sign_urls(data, result.outcome.owner, base)
            return ResultBody(result.content_type, len(data) + len(end), lambda: _pieces(data, end))
        return ResultBody(result.content_type, blob.size + len(end), lambda: self._from_blob(blob.name, end))

    async def _from_blob(self, name: str, end: bytes) -> AsyncIterator[bytes]:
        async with aclosing(self._blobs.read(name)) as pieces:
            async for piece in pieces:
                yield piece
        if end:
            yield end

    async def result(
        self, reply: Reply, result: JobResult, base: str, exchange: HttpExchange | None
    ) -> ErrorInfo | None:
        """Send the answer, or why there is none. Returns the error."""
        error = result_error(result)
        if error is not None:
            await reply.send_error(error)
            return error
        payload = self.payload(result, base)
        pieces = payload.pieces()
        first = await anext(pieces, b"")  # what fails here can still be told
        head = [(b"content-type", payload.content_type.encode()), (b"content-length", b"%d" % payload.size), NO_STORE]
        head += adapted_header(result.outcome.adapted)
        with exchange.single_write() if exchange is not None and len(first) == payload.size else nullcontext():
            await reply.send_head(200, head)
            await reply.send_chunk(first)
            async for piece in pieces:
                await reply.send_chunk(piece)
            await reply.send_end()
        return None

    async def relay_stream(
        self, reply: Reply, record: JobRecord, content_type: bytes, exchange: HttpExchange | None, *, ids: bool
    ) -> ErrorInfo | None:
        """The stream as a synchronous caller gets it; with `ids`, each event names itself, for `Last-Event-ID`.

        Until the first byte an error is a status. Returns the error.
        """
        stream = _StreamRelay(reply, content_type, exchange, ids=ids)
        events = self._jobs.follow(record.owner, record.id)
        hold = exchange.report_buffered if exchange is not None else _nothing
        async with aclosing(read_ahead(events, self._comment_after_s, event_size, hold)) as paced:
            async for ready in paced:
                if not ready:
                    await stream.comment(await self._position(record))
                for event in ready:
                    if event.outcome is not None:
                        return await stream.finish(result_error(JobResult(event.outcome, b"", None, "")))
                    if (error := await stream.send_event(event)) is not None:
                        return error
        return None

    async def _position(self, record: JobRecord) -> int | None:
        """How many jobs wait before it, while it waits."""
        with suppress(NexusError):
            return (await self._jobs.estimate(await self._jobs.get(record.owner, record.id)))[0]
        return None


def event_size(event: JobEvent) -> int:
    """Bytes, for `read_ahead`."""
    return len(event.data)


def _nothing(_size: int) -> None:
    pass


class _BufferedBytes:
    """Bytes that were read ahead, and those that the taker has in hand."""

    def __init__(self, hold: Callable[[int], None]) -> None:
        self._hold = hold
        self._told = 0
        self.ahead = self.in_hand = 0

    def report(self) -> None:
        """Tell the connection, if it is news."""
        total = self.ahead + self.in_hand
        if abs(total - self._told) >= REPORT_STEP_BYTES:
            self._told = total
            self._hold(total)

    def close(self) -> None:
        if self._told:
            self._hold(0)


async def read_ahead(
    events: AsyncGenerator[T, None],
    seconds: float,
    size: Callable[[T], int] = lambda _: 0,
    hold: Callable[[int], None] = _nothing,
) -> AsyncGenerator[list[T], None]:
    """The events, as many at a time as are there; none of them whenever none has come for `seconds`. Closes `events`.

    `size`: bytes of one. `hold` hears how many of them are stored here, see `gateway.http.asgi.HttpExchange.report_buffered`.
    """
    ready: asyncio.Queue[T] = asyncio.Queue(MAX_EVENTS_AHEAD)
    held, room = _BufferedBytes(hold), asyncio.Event()

    async def pump() -> None:
        try:
            async for event in events:
                held.ahead += size(event)
                held.report()
                await ready.put(event)
                while held.ahead > MAX_BYTES_AHEAD:
                    room.clear()
                    await room.wait()
        finally:
            await events.aclose()

    def taken(some: list[T]) -> list[T]:
        held.in_hand = sum(map(size, some))
        held.ahead -= held.in_hand
        held.report()
        room.set()
        return some

    pumping = asyncio.create_task(pump())
    coming: asyncio.Future[T] | None = None
    try:
        while True:
            held.in_hand = 0
            if not ready.empty():
                yield taken([ready.get_nowait() for _ in range(ready.qsize())])
                continue
            held.report()
            if pumping.done():
                pumping.result()
                return
            coming = asyncio.ensure_future(ready.get())
            await asyncio.wait((coming, pumping), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                yield taken([coming.result()])
            else:
                coming.cancel()
                if not pumping.done():
                    yield []
    finally:
        pumping.cancel()
        if coming is not None:
            coming.cancel()
        held.close()
        await asyncio.gather(pumping, return_exceptions=True)


class _StreamRelay:
    """One answer that is passed on as it is made."""

    def __init__(self, reply: Reply, content_type: bytes, exchange: HttpExchange | None, *, ids: bool) -> None:
        self._reply = reply
        self._type = content_type
        self._sse = is_sse(content_type.decode())
        self._exchange = exchange
        self._ids = ids and self._sse
        self._has_output = False
        self._adapted: tuple[str, ...] = ()

    async def send_event(self, event: JobEvent) -> ErrorInfo | None:
        if event.kind is JobEventKind.CHUNK:
            await self._begin()
            self._has_output = True
            await self._reply.send_chunk(b"id: %b\n%b" % (event.id.encode(), event.data) if self._ids else event.data)
        elif event.kind is JobEventKind.ADAPTED:
            self._adapted = AdaptedParameters.model_validate_json(event.data).parameters
            if self._reply.started and self._sse:
                await self._reply.send_chunk(adapted_frame(self._adapted))
        elif event.kind is JobEventKind.PROGRESS and self._sse:
            await self._begin()
            await self._reply.send_chunk(progress_frame(event.data))
        elif event.kind is JobEventKind.RESTARTED and self._has_output:
            # The job goes on, and its events can be followed; two attempts are not mixed here.
            info = BackendFailed("the worker was lost in the middle of this answer", code="worker_lost").info
            return await self.finish(info)
        return None

    async def comment(self, position: int | None) -> None:
        """Keep the connection of a stream that waits alive."""
        if position is not None and self._sse:
            await self._begin()
            await self._reply.send_chunk(comment_frame(position))

    async def finish(self, error: ErrorInfo | None) -> ErrorInfo | None:
        if error is None:
            await self._begin()
            await self._reply.send_end(DONE if self._sse else b"")
        elif not self._reply.started:
            await self._reply.send_error(error)
        elif self._sse:
            await self._reply.send_end(error_frame(error))
        elif self._exchange is not None:
            self._exchange.truncate()
        else:
            raise ConnectionAbortedError(error.message)
        return error

    async def _begin(self) -> None:
        if not self._reply.started:
            head = [(b"content-type", self._type), *STREAM_HEADERS, *adapted_header(self._adapted)]
            await self._reply.send_head(200, head)


async def _pieces(data: bytes, end: bytes) -> AsyncIterator[bytes]:
    yield data + end
