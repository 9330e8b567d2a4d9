"""`/v1/jobs`: list, watch, cancel, retry. `POST /v1/jobs` is served by `gateway.jobs.http_handler`, one job by `gateway.jobs.http_handler`."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from gateway.auth.authenticator import Principal
from gateway.dependencies import JobsCaller, Parts, PartsDep
from gateway.http.asgi import EXCHANGE, STREAM_HEADERS, HttpExchange, adapted_header
from gateway.jobs.api import JobEvent
from gateway.jobs.http_handler import job_with_estimate
from gateway.jobs.http_response import event_size, read_ahead, result_error
from gateway.jobs.records import job_object
from gateway.signed_urls import base_url
from gateway.sse_frames import comment_frame
from schemas.errors import InvalidRequest, NexusError
from schemas.job_events import JobEventKind
from schemas.jobs import JobStatus

router = APIRouter(tags=["jobs"])

PAUSE_S = 10.0
"""A stream of events without one for so long gets a comment, so that nothing in between takes it for dead."""
SSE = "text/event-stream; charset=utf-8"

_METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)


@router.get("/v1/jobs")
async def list_jobs(
    request: Request,
    parts: PartsDep,
    caller: JobsCaller,
    status: Annotated[JobStatus | None, Query()] = None,
    model: Annotated[str, Query()] = "",
    after: Annotated[str, Query()] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """The caller's jobs, newest first; also by `metadata[name]=value`. The next page is behind `last_id`."""
    metadata = _metadata(request.query_params.multi_items())
    records, has_more = await parts.jobs.page(
        caller.owner, status=status, model=model, metadata=metadata, after=after, limit=limit
    )
    return {
        "object": "list",
        "data": [job_object(record) for record in records],
        "first_id": records[0].id if records else None,
        "last_id": records[-1].id if records else None,
        "has_more": has_more,
    }


def _metadata(parameters: list[tuple[str, str]]) -> dict[str, str]:
    """Raises InvalidRequest: a filter that is ignored would list what nobody asked for."""
    found = {}
    for name, value in parameters:
        if name == "metadata" or name.startswith("metadata["):
            match = _METADATA.fullmatch(name)
            if match is None:
                raise InvalidRequest(
                    "metadata is asked for as metadata[NAME]=VALUE; a name has 1 to 64 characters", param=name[:100]
                )
            found[match[1]] = value
    return found


@router.get("/v1/jobs/{job_id}/result")
async def get_result(job_id: str, request: Request, parts: PartsDep, caller: JobsCaller) -> Response:
    """The answer as the endpoint makes it, with its content type; the error and its status, where it failed."""
    result = await parts.jobs.result(caller.owner, job_id)
    error = result_error(result)
    if error is not None:
        raise NexusError.from_info(error)
    payload = parts.job_responder.payload(result, base_url(request.scope))
    pieces = payload.pieces()
    first = await anext(pieces, b"")  # what fails here can still be told
    headers = {"content-length": str(payload.size)}
    headers |= {name.decode(): value.decode() for name, value in adapted_header(result.outcome.adapted)}
    return StreamingResponse(_behind(first, pieces), media_type=payload.content_type, headers=headers)


async def _behind(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in pieces:
        yield piece


@router.get("/v1/jobs/{job_id}/events")
async def get_events(job_id: str, request: Request, parts: PartsDep, caller: JobsCaller) -> Response:
    """Server-sent events from the beginning, or behind `Last-Event-ID`, to the end of the job."""
    after = request.headers.get("last-event-id", "")
    events = parts.jobs.follow(caller.owner, job_id, after)
    # What cannot be followed is an error and no stream.
    line: HttpExchange | None = request.scope.get(EXCHANGE)
    paced = read_ahead(events, PAUSE_S, event_size, line.report_buffered if line is not None else lambda _size: None)
    try:
        first: list[JobEvent] | None = await anext(paced, None)
    except BaseException:
        await paced.aclose()
        raise
    if first is None:
        return Response(status_code=204)  # a browser's EventSource takes this for the end
    headers = {name.decode(): value.decode() for name, value in STREAM_HEADERS}
    frames = _frames(parts, caller, job_id, first, paced)
    return StreamingResponse(frames, media_type=SSE, headers=headers)


async def _frames(
    parts: Parts, caller: Principal, job_id: str, first: list[JobEvent], paced: AsyncGenerator[list[JobEvent], None]
) -> AsyncIterator[bytes]:
    async with aclosing(paced):
        yield b"".join(map(event_frame, first))
        try:
            # A caller whose stream just ends comes back behind its last event, to another gateway.
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
    """One event on its way to the caller."""
    data = event.data
    if event.kind is JobEventKind.CHUNK:
        data = _chunk(data)
    return b"event: %b\nid: %b\ndata: %b\n\n" % (event.kind.value.encode(), event.id.encode(), data)


def _chunk(data: bytes) -> bytes:
    """The endpoint's own chunk: the JSON of a server-sent event; of sound, its bytes in base64."""
    if data.startswith((b"data:", b"event:", b"id:")):
        lines = [line[5:].strip() for line in data.split(b"\n") if line.startswith(b"data:")]
        return b"\ndata: ".join(lines)
    return b'{"b64":"%b"}' % b64encode(data)


@router.post("/v1/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Queued, it never runs; running, its backend is stopped. Of a job that has ended, how it did."""
    return await job_with_estimate(parts.jobs, await parts.jobs.cancel(caller.owner, job_id))


@router.post("/v1/jobs/{job_id}/retry", status_code=202)
async def retry_job(job_id: str, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """A new run of a failed job, under its id."""
    return await job_with_estimate(parts.jobs, await parts.jobs.retry(caller.owner, job_id))
