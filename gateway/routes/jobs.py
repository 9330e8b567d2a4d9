"""`/v1/jobs`: list, results, events, cancel, retry. `gateway.jobs.http_handler` serves `POST /v1/jobs` and `GET /v1/jobs/{id}`."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from gateway.auth.authenticator import Principal
from gateway.dependencies import JobsCaller, Parts, PartsDep
from gateway.http.asgi import EXCHANGE, STREAM_HEADERS, HttpExchange, adapted_header
from gateway.http.request_body import read_json
from gateway.job_requests import BulkRequest
from gateway.jobs.api import JobEvent, JobResult
from gateway.jobs.http_handler import job_with_estimate
from gateway.jobs.http_response import result_error
from gateway.jobs.read_ahead import event_size, no_report, read_ahead
from gateway.limits.followers import HoldingResponse
from gateway.routes.job_lists import RETRYABLE, UNFINISHED, JobLists
from gateway.signed_urls import base_url
from gateway.sse_frames import EVENT_STREAM, comment_frame
from schemas.errors import NexusError
from schemas.job_events import JobEventKind

router = APIRouter(tags=["jobs"])

KEEP_ALIVE_S = 10.0
"""The pause after which a stream sends a comment, so that proxies keep the connection open."""


@router.get("/v1/jobs")
async def list_jobs(request: Request, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """List the caller's jobs that meet the filters, newest first."""
    return await JobLists(parts, caller.owner, for_operator=False).page(request)


@router.get("/v1/jobs/export")
async def export_jobs(request: Request, parts: PartsDep, caller: JobsCaller) -> Response:
    """Return the caller's jobs that meet the filters as JSON lines or CSV."""
    with ExitStack() as resources:
        resources.enter_context(parts.followers.hold(caller.limits))
        exported = await JobLists(parts, caller.owner, for_operator=False).export(request)
        return HoldingResponse(exported, resources.pop_all())


@router.post("/v1/jobs/bulk/cancel")
async def cancel_jobs(request: Request, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Cancel the caller's jobs with these ids, or those that meet a filter."""
    body = await read_json(request, BulkRequest)
    result, after = await JobLists(parts, caller.owner, for_operator=False).change(body, parts.jobs.cancel, UNFINISHED)
    return result.to_object(after)


@router.post("/v1/jobs/bulk/retry")
async def retry_jobs(request: Request, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Start new runs of the caller's failed jobs with these ids, or of those that meet a filter."""
    body = await read_json(request, BulkRequest)
    await parts.budgets.require_some(caller.limits)
    result, after = await JobLists(parts, caller.owner, for_operator=False).change(body, parts.jobs.retry, RETRYABLE)
    return result.to_object(after)


@router.get("/v1/jobs/{job_id}/input")
async def get_input(job_id: str, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Return the request that the job runs, as long as it is stored."""
    record = await parts.jobs.get(caller.owner, job_id)
    body = await parts.jobs.input(caller.owner, job_id)
    return {"id": job_id, "object": "job.input", "endpoint": record.endpoint, "body": body}


@router.get("/v1/jobs/{job_id}/result")
async def get_result(job_id: str, request: Request, parts: PartsDep, caller: JobsCaller) -> Response:
    """Return the endpoint's response with its content type, or the job's error with the error's status."""
    result = await parts.jobs.result(caller.owner, job_id)
    error = result_error(result)
    if error is not None:
        raise NexusError.from_info(error)
    payload = await parts.job_responder.shown_payload(result, base_url(request.scope), caller.key_id)
    pieces = payload.pieces()
    first = await anext(pieces, b"")  # a failure here can still be sent as an error
    headers = {"content-length": str(payload.size)}
    headers |= {name.decode(): value.decode() for name, value in adapted_header(result.outcome.adapted)}
    body = _deliver(parts, result, first, pieces)
    return StreamingResponse(body, media_type=payload.content_type, headers=headers)


async def _deliver(parts: Parts, result: JobResult, first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in pieces:
        yield piece
    await parts.jobs.confirm_delivery(result.outcome)  # the last piece was handed to the connection


@router.get("/v1/jobs/{job_id}/events")
async def get_events(job_id: str, request: Request, parts: PartsDep, caller: JobsCaller) -> Response:
    """Return the job's events as server-sent events, from the first one or after `Last-Event-ID`, until the job ends."""
    with ExitStack() as resources:
        resources.enter_context(parts.followers.hold(caller.limits))
        return HoldingResponse(await _events_response(job_id, request, parts, caller), resources.pop_all())


async def _events_response(job_id: str, request: Request, parts: Parts, caller: Principal) -> Response:
    after = request.headers.get("last-event-id", "")
    events = parts.jobs.follow(caller.owner, job_id, after)
    # Errors of the first read become an HTTP status.
    line: HttpExchange | None = request.scope.get(EXCHANGE)
    paced = read_ahead(events, KEEP_ALIVE_S, event_size, line.report_buffered if line is not None else no_report)
    try:
        first: list[JobEvent] | None = await anext(paced, None)
    except BaseException:
        await paced.aclose()
        raise
    if first is None:
        return Response(status_code=204)  # makes a browser's EventSource stop
    headers = {name.decode(): value.decode() for name, value in STREAM_HEADERS}
    frames = _frames(parts, caller, job_id, first, paced)
    return StreamingResponse(frames, media_type=EVENT_STREAM, headers=headers)


async def _frames(
    parts: Parts, caller: Principal, job_id: str, first: list[JobEvent], paced: AsyncGenerator[list[JobEvent], None]
) -> AsyncIterator[bytes]:
    async with aclosing(paced):
        yield b"".join(map(event_frame, first))
        try:
            # At shutdown the stream just ends: the caller resumes it on another gateway.
            async for ready in parts.caller_tasks.iterate_until_shutdown(paced):
                yield b"".join(map(event_frame, ready)) or await _pause(parts, caller, job_id)
        except NexusError as error:
            yield b"event: error\ndata: %b\n\n" % orjson.dumps(error.info.body())


async def _pause(parts: Parts, caller: Principal, job_id: str) -> bytes:
    try:
        position = (await parts.jobs.estimate(await parts.jobs.get(caller.owner, job_id)))[0]
    except NexusError:
        position = None
    return comment_frame(position) if position is not None else b": keep-alive\n\n"


def event_frame(event: JobEvent) -> bytes:
    """Encode a job event as a server-sent event."""
    data = event.data
    if event.kind is JobEventKind.CHUNK:
        data = _chunk(data)
    return b"event: %b\nid: %b\ndata: %b\n\n" % (event.kind.value.encode(), event.id.encode(), data)


def _chunk(data: bytes) -> bytes:
    """Return a chunk's data: the JSON of a server-sent event, or bytes in Base64."""
    if data.startswith((b"data:", b"event:", b"id:")):
        lines = [line[5:].strip() for line in data.split(b"\n") if line.startswith(b"data:")]
        return b"\ndata: ".join(lines)
    return b'{"b64":"%b"}' % b64encode(data)


@router.post("/v1/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Cancel a job: a queued job never runs, a running job is stopped, an ended job stays unchanged."""
    return await job_with_estimate(parts.jobs, await parts.jobs.cancel(caller.owner, job_id))


@router.post("/v1/jobs/{job_id}/retry", status_code=202)
async def retry_job(job_id: str, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Start a new run of a failed job under the same id."""
    await parts.budgets.require_some(caller.limits)
    return await job_with_estimate(parts.jobs, await parts.jobs.retry(caller.owner, job_id))
