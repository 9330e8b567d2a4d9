"""Small JSON bodies, of routes that are no inference: read within bounds and parsed as strictly as the others."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from gateway.parsing import CallerGone, parse, read_body
from schemas.errors import InvalidRequest

T = TypeVar("T", bound=BaseModel)

MAX_BYTES = 64 * 1024
TIMEOUT_S = 10.0


async def read_json(request: Request, schema: type[T]) -> T:
    """The request's body as `schema`. Raises InvalidRequest, RequestTooLarge, RequestTimeout."""
    try:
        body = await read_body(request.scope["headers"], request.receive, MAX_BYTES, TIMEOUT_S)
    except CallerGone:
        raise InvalidRequest("the request's body broke off") from None  # nobody hears it
    return parse(body, schema)


def documented(schema: type[BaseModel]) -> dict[str, Any]:
    """What `/docs` is to say about the body of a route that calls `read_json`."""
    shape = schema.model_json_schema()
    shape = _inlined(shape, shape.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": shape}}}}


def _inlined(shape: Any, definitions: dict[str, Any]) -> Any:
    """`shape` with its definitions where it refers to them: within a larger document its references would point nowhere."""
    if isinstance(shape, list):
        return [_inlined(part, definitions) for part in shape]
    if not isinstance(shape, dict):
        return shape
    if isinstance(name := shape.get("$ref"), str):
        return _inlined(definitions[name.removeprefix("#/$defs/")], definitions)
    return {key: _inlined(part, definitions) for key, part in shape.items()}


def check_name(name: str, what: str, param: str) -> str:
    """`name`, fit to be a key of the registry and a line on a terminal. Raises InvalidRequest."""
    if not name or len(name) > 200 or not name.isprintable() or name != name.strip():
        raise InvalidRequest(
            f"{what} is 1 to 200 printable characters without blanks around it, not {name[:100]!r}", param=param
        )
    return name
