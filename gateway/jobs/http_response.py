"""Sends durable jobs over HTTP: the 202, a result, or a live stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass

import orjson

from backbone.bus.blobs import BlobStore
from gateway.http.asgi import NO_STORE, Headers, HttpExchange, Reply, adapted_header
from gateway.http.preferences import DeliveryPreferences
from gateway.http.stream_writer import StreamWriter
from gateway.jobs.api import JobEvent, JobResult, JobsApi
from gateway.jobs.read_ahead import event_size, no_report, read_ahead
from gateway.jobs.records import job_object
from gateway.signed_urls import BLOB_URI_PREFIX, UrlSigner
from gateway.sse_frames import DONE, comment_frame, progress_frame
from schemas.errors import BackendFailed, DeadlineExceeded, ErrorInfo, InvalidRequest, NexusError
from schemas.frames import AdaptedParameters
from schemas.job_events import JobEventKind
from schemas.jobs import Capability, JobRecord, JobStatus, is_sse

RESULT_WAIT_S = 300.0
"""The timeout of one wait for a result. The wait is repeated."""
URL_MARKER = BLOB_URI_PREFIX.encode()


def result_error(result: JobResult) -> ErrorInfo | None:
    """Return the error of an ended job, or None if it completed."""
    outcome = result.outcome
    if outcome.status is JobStatus.COMPLETED:
        return None
    if outcome.error is not None:
        return outcome.error
    if outcome.status is JobStatus.CANCELLED:
        return InvalidRequest(
            "The job was cancelled. Submit it again if you still need the result.", code="job_cancelled"
        ).info
    return DeadlineExceeded(
        "The job expired before it completed. Submit it again, with a longer `timeout` if it had one.",
        code="job_expired",
    ).info


@dataclass(frozen=True, slots=True)
class ResultBody:
    """The body of a completed job, ready to send."""

    content_type: str
    size: int
    pieces: Callable[[], AsyncIterator[bytes]]


class JobResponder:
    """Sends records, results and streams of durable jobs to callers."""

    def __init__(
        self,
        jobs: JobsApi,
        blobs: BlobStore,
        url_signer: UrlSigner,
        comment_after_s: float,
        translations: Mapping[str, Callable[[bytes, str], bytes]] | None = None,
    ) -> None:
        """Create a responder. `translations`: of results, by the endpoint that the caller used; of a result's bytes and the job's id."""
        self._jobs = jobs
        self._translations = translations or {}
        self._comment_after_s = comment_after_s
        self._blobs = blobs
        self._url_signer = url_signer

    async def send_accepted(
        self, reply: Reply, record: JobRecord, preferences: DeliveryPreferences | None = None
    ) -> None:
        """Send 202 with the job."""
        headers: Headers = [(b"location", f"/v1/jobs/{record.job}".encode())]
        if preferences is not None:
            headers += [(b"preference-applied", preferences.applied), (b"vary", b"prefer")]
        await reply.send_response(202, "application/json", orjson.dumps(job_object(record)), headers)

    async def wait_for_result(self, owner: str, job_id: str) -> JobResult:
        """Wait until the job has ended, and return its result."""
        while (result := await self._jobs.wait_for_result(owner, job_id, RESULT_WAIT_S)) is None:
            pass
        return result

    def payload(self, result: JobResult, base: str, key: str | None = None) -> ResultBody:
        """Return the body of a completed job.

        `base` is the URL at which the caller reached the gateway, for URLs in the body, and `key` the id of the API key with which these
        URLs end. None: the key that submitted the job.
        """
        blob, data = result.blob, result.data
        end = DONE if is_sse(result.content_type) else b""
        if blob is None:
            if result.outcome.capability is Capability.IMAGES and URL_MARKER in data and not end:
                data = self._url_signer.sign_urls(
                    data, result.outcome.owner, base, result.outcome.key if key is None else key
                )
            return ResultBody(result.content_type, len(data) + len(end), lambda: _pieces(data, end))
        return ResultBody(result.content_type, blob.size + len(end), lambda: self._from_blob(blob.name, end))

    async def shown_payload(self, result: JobResult, base: str, key: str | None = None) -> ResultBody:
        """Return the body of a completed job in the form of the endpoint that the caller used. Arguments as for `payload`."""
        payload = self.payload(result, base, key)
        translate = self._translations.get(result.outcome.endpoint)
        if translate is None:
            return payload
        data = translate(b"".join([piece async for piece in payload.pieces()]), result.outcome.job)
        return ResultBody(payload.content_type, len(data), lambda: _pieces(data, b""))

    async def _from_blob(self, name: str, end: bytes) -> AsyncIterator[bytes]:
        async with aclosing(self._blobs.read(name)) as pieces:
            async for piece in pieces:
                yield piece
        if end:
            yield end

    async def send_result(self, reply: Reply, result: JobResult, base: str) -> ErrorInfo | None:
        """Send the result or the error of an ended job. Return the error."""
        error = result_error(result)
        if error is not None:
            await reply.send_error(error)
            return error
        payload = self.payload(result, base)
        pieces = payload.pieces()
        first = await anext(pieces, b"")  # a failure here can still be sent as an error
        reply.headers += adapted_header(result.outcome.adapted)
        if len(first) == payload.size:
            await reply.send_response(200, payload.content_type, first)
            await self._jobs.confirm_delivery(result.outcome)
            return None
        head = [(b"content-type", payload.content_type.encode()), (b"content-length", b"%d" % payload.size), NO_STORE]
        await reply.send_head(200, head)
        await reply.send_chunk(first)
        async for piece in pieces:
            await reply.send_chunk(piece)
        await reply.send_end()
        await self._jobs.confirm_delivery(result.outcome)
        return None

    async def relay_stream(
        self, reply: Reply, record: JobRecord, content_type: bytes, exchange: HttpExchange | None, *, ids: bool
    ) -> ErrorInfo | None:
        """Send a live stream as for a synchronous request. With `ids`, each event carries its id for `Last-Event-ID`.

        An error before the first byte becomes an HTTP status. Return the error.
        """
        stream = _StreamRelay(reply, content_type, ids=ids)
        events = self._jobs.follow(record.owner, record.job)
        hold = exchange.report_buffered if exchange is not None else no_report
        async with aclosing(read_ahead(events, self._comment_after_s, event_size, hold)) as paced:
            async for ready in paced:
                if not ready and (position := await self._position(record)) is not None:
                    await stream.writer.comment(comment_frame(position))
                for event in ready:
                    if event.outcome is not None:
                        error = await stream.finish(result_error(JobResult(event.outcome, b"", None, "")))
                        await self._jobs.confirm_delivery(event.outcome)
                        return error
                    if (error := await stream.send_event(event)) is not None:
                        return error
        return None

    async def _position(self, record: JobRecord) -> int | None:
        """Return the queue position of a waiting job, or None."""
        with suppress(NexusError):
            return (await self._jobs.estimate(await self._jobs.get(record.owner, record.job)))[0]
        return None


class _StreamRelay:
    """Sends the events of one streamed job as they arrive."""

    def __init__(self, reply: Reply, content_type: bytes, *, ids: bool) -> None:
        self.writer = StreamWriter(reply, content_type)
        self._ids = ids and is_sse(content_type.decode())
        self._has_output = False

    async def send_event(self, event: JobEvent) -> ErrorInfo | None:
        writer = self.writer
        if event.kind is JobEventKind.CHUNK:
            self._has_output = True
            await writer.write(b"id: %b\n%b" % (event.id.encode(), event.data) if self._ids else event.data)
        elif event.kind is JobEventKind.ADAPTED:
            await writer.adapt(AdaptedParameters.model_validate_json(event.data).parameters)
        elif event.kind is JobEventKind.PROGRESS:
            await writer.comment(progress_frame(event.data))
        elif event.kind is JobEventKind.RESTARTED and self._has_output:
            # The job continues and can be followed; this stream must not mix two attempts.
            info = BackendFailed(
                "The worker was lost during this response. Send the request again, or follow the job at `GET /v1/jobs/{id}/events`.",
                code="worker_lost",
            ).info
            return await self.finish(info)
        return None

    async def finish(self, error: ErrorInfo | None) -> ErrorInfo | None:
        if error is None:
            await self.writer.end(DONE)
        else:
            await self.writer.abort(error)
        return error


async def _pieces(data: bytes, end: bytes) -> AsyncIterator[bytes]:
    yield data + end
