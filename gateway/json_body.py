"""Small JSON bodies, of routes that are no inference: read within bounds and parsed as strictly as the others."""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

from fastapi import Request
from pydantic import BaseModel, Field

from gateway.parsing import CallerGone, parse, read_body
from schemas.errors import InvalidRequest
from schemas.names import DISPLAY_NAME

T = TypeVar("T", bound=BaseModel)

MAX_BYTES = 64 * 1024
TIMEOUT_S = 10.0
MAX_NAME = 200
_NAME = re.compile(DISPLAY_NAME)

Name = Annotated[str, Field(json_schema_extra={"minLength": 1, "maxLength": MAX_NAME, "pattern": DISPLAY_NAME})]
"""What `check_name` checks, as the OpenAPI document says it."""


async def read_json(request: Request, schema: type[T]) -> T:
    """The request's body as `schema`. Raises InvalidRequest, RequestTooLarge, RequestTimeout."""
    try:
        body = await read_body(request.scope["headers"], request.receive, MAX_BYTES, TIMEOUT_S)
    except CallerGone:
        raise InvalidRequest("the request's body broke off") from None  # nobody hears it
    return parse(body, schema)


def check_name(name: str, what: str, param: str) -> str:
    """`name`, fit to be a key of the registry and a line on a terminal. Raises InvalidRequest."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{what} is 1 to {MAX_NAME} printable characters without blanks around it, not {name[:100]!r}", param=param
        )
    return name
