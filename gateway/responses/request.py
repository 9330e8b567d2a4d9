"""A request for a response, from its HTTP request."""

from __future__ import annotations

from fastapi import Request

from gateway.http.asgi import is_here
from gateway.http.body_memory import BodyShare
from gateway.http.inference_body import Reader
from gateway.http.preferences import wish_of
from gateway.http.request_body import CallerGone, parse
from schemas.errors import InvalidRequest
from schemas.openai.responses import ResponsesRequest


async def read(request: Request, reader: Reader, share: BodyShare) -> ResponsesRequest:
    """The body, checked. Hold `share` as long as it is in memory. Raises as `Reader.read`, but for CallerGone."""
    try:
        body = await reader.body(request.scope["headers"], request.receive, share, here=is_here(request.scope))
    except CallerGone:
        raise InvalidRequest("the request's body broke off") from None  # nobody hears it
    return parse(body, ResponsesRequest)


def key_of(request: Request) -> str:
    """The Idempotency-Key; empty: there is none. Raises InvalidRequest."""
    wish = wish_of(request.scope["headers"])
    return wish.key if wish is not None else ""
