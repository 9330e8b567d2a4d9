"""A request for a response, from its HTTP request."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from fastapi import Request

from gateway.bodies import Reader
from gateway.http import is_here
from gateway.parsing import CallerGone, parse, read_body
from gateway.wishes import wish_of
from schemas.errors import InvalidRequest
from schemas.openai.responses import ResponsesRequest


def memory(request: Request, reader: Reader) -> AbstractAsyncContextManager[None]:
    """Hold it as long as the request is in memory."""
    return reader.memory(request.scope["headers"], here=is_here(request.scope))


async def read(request: Request, reader: Reader) -> ResponsesRequest:
    """The body, checked. Raises InvalidRequest, RequestTooLarge, RequestTimeout."""
    here, headers = is_here(request.scope), request.scope["headers"]
    try:
        body = await read_body(headers, request.receive, reader.max_bytes, reader.timeout_s, here=here)
    except CallerGone:
        raise InvalidRequest("the request's body broke off") from None  # nobody hears it
    return parse(body, ResponsesRequest)


def key_of(request: Request) -> str:
    """The Idempotency-Key; empty: there is none. Raises InvalidRequest."""
    wish = wish_of(request.scope["headers"])
    return wish.key if wish is not None else ""
