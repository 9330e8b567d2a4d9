"""`/v1/responses`: OpenAI's Responses API. Every response is a durable chat job."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from gateway.dependencies import InferenceCaller, PartsDep
from gateway.http.asgi import adapted_header, request_id_of
from gateway.http.request_body import CallerDisconnected
from gateway.responses.http_response import CLIENT_CLOSED_STATUS, RequestReport, ResponseStreamReply, StreamStart
from gateway.responses.request import key_of, read
from schemas.errors import InvalidRequest, NexusError, Unavailable
from schemas.keys import Scope

router = APIRouter(tags=["responses"])

JSON = dict[str, Any]


@router.post("/v1/responses")
async def create_response(request: Request, parts: PartsDep, caller: InferenceCaller) -> Response:
    """The answer to `input`; with `stream` its events; with `background` what it begins as, at once."""
    responses = parts.responses
    report = RequestReport(responses.metrics, request_id_of(request.scope))
    try:
        with parts.reader.memory.share(caller.key_id) as share:
            asked = await read(request, parts.reader, share)
            background, streamed = asked.background, asked.stream
            if background:
                caller.require(Scope.JOBS)
            key = key_of(request)
            # Not half a response: a caller who hangs up meanwhile has one, or has none.
            created = await asyncio.shield(responses.create(caller, asked, request_id_of(request.scope), key))
            del asked
        report.created = created
        if streamed:
            start = StreamStart.IMMEDIATELY if background else StreamStart.ON_OUTPUT
            return ResponseStreamReply(responses, created, start, responses.keep_alive_s, report)
        adapted: tuple[str, ...] = ()
        if background:
            answer = await responses.retrieve(caller.owner, created.id) if key else created.initial
        else:
            answer, adapted = await responses.open.run_while_connected(
                responses.answer(created), request.scope, request.receive
            )
    except NexusError as error:
        report.close(error.info.status, error.info)
        if isinstance(error, Unavailable) and report.created is not None and report.created.bound_to_connection:
            await responses.abandon(report.created)  # it will be asked for again
        raise
    except CallerDisconnected:
        report.close(CLIENT_CLOSED_STATUS)
        if report.created is not None and report.created.bound_to_connection:
            await responses.abandon(report.created)
        return Response(status_code=CLIENT_CLOSED_STATUS)
    report.close(200)
    headers = {name.decode(): value.decode() for name, value in adapted_header(adapted)}
    return JSONResponse(answer, headers={"x-nexus-job-id": created.job} | headers)


@router.get("/v1/responses/{response_id}")
async def get_response(
    response_id: str,
    parts: PartsDep,
    caller: InferenceCaller,
    stream: Annotated[bool, Query()] = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """A response as it stands; with `stream` its events, those after `starting_after`, and those to come."""
    responses = parts.responses
    if not stream:
        return JSONResponse(await responses.retrieve(caller.owner, response_id))
    created = await responses.created(caller.owner, response_id)
    after = -1 if starting_after is None else starting_after
    return ResponseStreamReply(responses, created, StreamStart.ON_STORED_EVENTS, responses.keep_alive_s, None, after)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, parts: PartsDep, caller: InferenceCaller) -> JSON:
    """End a background response. One that has ended stays as it is."""
    return await parts.responses.cancel(caller.owner, response_id)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, parts: PartsDep, caller: InferenceCaller) -> JSON:
    """Forget a response; one that still runs ends."""
    await parts.responses.delete(caller.owner, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    parts: PartsDep,
    caller: InferenceCaller,
    after: Annotated[str, Query()] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
) -> JSON:
    """What a response was asked with, newest first."""
    items = await parts.responses.input_items(caller.owner, response_id)
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after and after not in ids:
        raise InvalidRequest(f"'{after[:100]}' is no item of this response", param="after")
    begin = ids.index(after) + 1 if after else 0
    shown = items[begin : begin + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": begin + limit < len(items),
    }
