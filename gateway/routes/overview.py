"""`/v1/overview`: what happens now, over all gateways."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing

import orjson
from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse

from gateway.audit.route import AuditedRoute
from gateway.dependencies import AdminReader, Parts, PartsDep
from gateway.http.asgi import STREAM_HEADERS
from gateway.limits.followers import HoldingResponse
from gateway.sse_frames import EVENT_STREAM

router = APIRouter(tags=["operation"], route_class=AuditedRoute)
status_router = APIRouter(tags=["operation"])


@router.get("/v1/overview")
async def get_overview(parts: PartsDep, _: AdminReader) -> Response:
    """Return a row for each model, and what needs attention."""
    return Response(orjson.dumps(await parts.overview.read()), media_type="application/json")


@router.get("/v1/overview/events")
async def follow_overview(parts: PartsDep, caller: AdminReader) -> Response:
    """Return the overview as server-sent events: the whole first, then what changes, each second."""
    with ExitStack() as resources:
        resources.enter_context(parts.followers.hold(caller.limits))
        headers = {name.decode(): value.decode() for name, value in STREAM_HEADERS}
        stream = StreamingResponse(_events(parts), media_type=EVENT_STREAM, headers=headers)
        return HoldingResponse(stream, resources.pop_all())


@status_router.get("/status.json")
async def get_status(parts: PartsDep) -> Response:
    """Return which models are up, for anybody."""
    return Response(
        await parts.status.text(), media_type="application/json", headers={"cache-control": "public, max-age=5"}
    )


async def _events(parts: Parts) -> AsyncIterator[bytes]:
    events: AsyncGenerator[bytes, None] = parts.overview.follow()
    async with aclosing(events):
        async for event in parts.caller_tasks.iterate_until_shutdown(events):
            yield event
