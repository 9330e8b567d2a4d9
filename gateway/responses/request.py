"""A request for a response, from its HTTP request."""

from __future__ import annotations

from fastapi import Request

from gateway.http.asgi import body_is_complete
from gateway.http.body_memory import BodyShare
from gateway.http.inference_body import InferenceBodyReader
from gateway.http.preferences import read_preferences
from gateway.http.request_body import CallerDisconnected, parse_body
from schemas.errors import InvalidRequest
from schemas.openai.responses import ResponsesRequest


async def read(request: Request, reader: InferenceBodyReader, share: BodyShare) -> ResponsesRequest:
    """The body, checked. Hold `share` as long as it is in memory. Raises as `InferenceBodyReader.read`, but for CallerDisconnected."""
    try:
        body = await reader.read_body(
            request.scope["headers"], request.receive, share, here=body_is_complete(request.scope)
        )
    except CallerDisconnected:
        raise InvalidRequest("the request's body broke off") from None  # nobody hears it
    return parse_body(body, ResponsesRequest)


def key_of(request: Request) -> str:
    """The Idempotency-Key; empty: there is none. Raises InvalidRequest."""
    preferences = read_preferences(request.scope["headers"])
    return preferences.key if preferences is not None else ""
