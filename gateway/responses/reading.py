"""A request for a response, from its HTTP request."""

from __future__ import annotations

from fastapi import Request

from gateway.bodies import LARGE, WEIGHT, Reader
from gateway.http import LINE
from gateway.parsing import CallerGone, parse, read_body
from gateway.wishes import wish_of
from schemas.errors import InvalidRequest
from schemas.openai.responses import ResponsesRequest


async def read(request: Request, reader: Reader) -> ResponsesRequest:
    """The body, checked. Raises InvalidRequest, RequestTooLarge, RequestTimeout."""
    line, headers = request.scope.get(LINE), request.scope["headers"]
    here = line is not None and line.body_complete
    size = reader.announced(headers)
    try:
        if here or size <= LARGE:
            return parse(await _body(request, reader, here=here), ResponsesRequest)
        async with reader.budget.share(WEIGHT * size):
            return parse(await _body(request, reader, here=False), ResponsesRequest)
    except CallerGone:
        raise InvalidRequest("the request's body broke off") from None  # nobody hears it


async def _body(request: Request, reader: Reader, *, here: bool) -> bytes:
    return await read_body(request.scope["headers"], request.receive, reader.max_bytes, reader.timeout_s, here=here)


def key_of(request: Request) -> str:
    """The Idempotency-Key; empty: there is none. Raises InvalidRequest."""
    wish = wish_of(request.scope["headers"])
    return wish.key if wish is not None else ""
