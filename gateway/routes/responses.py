"""`/v1/responses`: OpenAI's Responses API. Every response is a durable chat job."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from gateway.auth.authenticator import caller_fields
from gateway.dependencies import InferenceCaller, PartsDep
from gateway.http.asgi import CALLER_INFO, adapted_header, body_is_complete, request_id_of
from gateway.http.body_memory import BodyShare
from gateway.http.inference_body import InferenceBodyReader
from gateway.http.preferences import read_preferences
from gateway.http.request_body import CallerDisconnected, parse_body
from gateway.limits.followers import HoldingResponse
from gateway.responses.http_response import CLIENT_CLOSED_STATUS, RequestReport, ResponseStreamReply, StreamStart
from schemas.errors import InvalidRequest, NexusError, Unavailable
from schemas.keys import Scope
from schemas.openai.responses import ResponsesRequest

router = APIRouter(tags=["responses"])

JSON = dict[str, Any]


@router.post("/v1/responses")
async def create_response(request: Request, parts: PartsDep, caller: InferenceCaller) -> Response:
    """Create a response. Return it, with `stream` its events, or with `background` its initial state immediately."""
    responses = parts.responses
    report = RequestReport(
        responses.metrics, request_id_of(request.scope), caller_fields(caller, request.scope.get(CALLER_INFO))
    )
    try:
        with parts.reader.memory.share(caller.owner) as share:
            body = await _read_request(request, parts.reader, share)
            background, streamed = body.background, body.stream
            if background:
                caller.require(Scope.JOBS)
            key = _idempotency_key(request)
            # A disconnect of the caller must not leave a half-created response.
            created = await asyncio.shield(responses.create(caller, body, request_id_of(request.scope), key))
            del body
        report.created = created
        if streamed:
            start = StreamStart.IMMEDIATELY if background else StreamStart.ON_OUTPUT
            return ResponseStreamReply(responses, created, start, responses.keep_alive_s, report)
        adapted: tuple[str, ...] = ()
        if background:
            answer = await responses.retrieve(caller.owner, created.id) if key else created.initial
        else:
            answer, adapted = await responses.caller_tasks.run_while_connected(
                responses.answer(created), request.scope, request.receive
            )
    except NexusError as error:
        report.close(error.info.status, error.info)
        if isinstance(error, Unavailable) and report.created is not None and report.created.bound_to_connection:
            await responses.abandon(report.created)  # the caller retries the request
        raise
    except CallerDisconnected:
        report.close(CLIENT_CLOSED_STATUS)
        if report.created is not None and report.created.bound_to_connection:
            await responses.abandon(report.created)
        return Response(status_code=CLIENT_CLOSED_STATUS)
    report.close(200)
    headers = {name.decode(): value.decode() for name, value in adapted_header(adapted)}
    return JSONResponse(answer, headers={"x-nexus-job-id": created.job} | headers)


async def _read_request(request: Request, reader: InferenceBodyReader, share: BodyShare) -> ResponsesRequest:
    """Read and validate the body. Hold `share` while it is in memory. Raises as `InferenceBodyReader.read_body`."""
    try:
        body = await reader.read_body(
            request.scope["headers"], request.receive, share, has_arrived=body_is_complete(request.scope)
        )
    except CallerDisconnected:
        raise InvalidRequest("The request's body is incomplete. Send the request again.") from None
    return parse_body(body, ResponsesRequest)


def _idempotency_key(request: Request) -> str:
    """Return the Idempotency-Key, or an empty string. Raises InvalidRequest."""
    preferences = read_preferences(request.scope["headers"])
    return preferences.key if preferences is not None else ""


@router.get("/v1/responses/{response_id}")
async def get_response(
    response_id: str,
    parts: PartsDep,
    caller: InferenceCaller,
    stream: Annotated[bool, Query()] = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """Return a response's current state, or with `stream` its events after `starting_after`."""
    responses = parts.responses
    if not stream:
        return JSONResponse(await responses.retrieve(caller.owner, response_id))
    with ExitStack() as resources:
        resources.enter_context(parts.followers.hold(caller.limits))
        created = await responses.created(caller.owner, response_id)
        after = -1 if starting_after is None else starting_after
        start = StreamStart.ON_STORED_EVENTS
        reply = ResponseStreamReply(responses, created, start, responses.keep_alive_s, None, after)
        return HoldingResponse(reply, resources.pop_all())


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, parts: PartsDep, caller: InferenceCaller) -> JSON:
    """Cancel a background response. A response that has ended stays unchanged."""
    return await parts.responses.cancel(caller.owner, response_id)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, parts: PartsDep, caller: InferenceCaller) -> JSON:
    """Delete a response. A running response is cancelled."""
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
    """List the input items of a response, newest first."""
    items = await parts.responses.input_items(caller.owner, response_id)
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after and after not in ids:
        raise InvalidRequest(
            f"'{after[:100]}' is not an input item of this response. Use an id from an earlier page.", param="after"
        )
    begin = ids.index(after) + 1 if after else 0
    page = items[begin : begin + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + limit < len(items),
    }
