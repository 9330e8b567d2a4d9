"""Read request bodies within bounds, and parse JSON once and strictly."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import parse_qs

import orjson
from fastapi import Request
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails

from gateway.http.body_memory import BodyShare
from gateway.http.content_coding import BodyDecoder
from schemas.errors import InvalidRequest, NexusError, RequestTimeout, RequestTooLarge
from schemas.names import DISPLAY_NAME

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

T = TypeVar("T", bound=BaseModel)

MAX_DEPTH = 100
MAX_DIGITS = 20
MAX_INTEGER = 2.0**63
"""A number with a decimal point is read as an integer below this."""
MIN_UPLOAD_RATE = 64 * 1024
"""Bytes per second below which an upload times out."""
UNCHARGED_BYTES = 64 * 1024
"""A body with an announced length up to this is not charged: the server buffers as much for every connection."""
MAX_JSON_BYTES = 64 * 1024
"""Largest body of a route that is not an inference endpoint."""
MAX_FORM_BYTES = 8 * 1024
MAX_FORM_FIELDS = 10
FORM_TYPE = "application/x-www-form-urlencoded"
JSON_TIMEOUT_S = 10.0
MAX_NAME_LENGTH = 200


class CallerDisconnected(Exception):
    """The caller disconnected."""


class BodyHead(NamedTuple):
    """Encoding and length of a body, as its request's head announces them."""

    encoding: bytes
    """The Content-Encoding; empty without one."""
    length: int
    """Bytes before decoding; the limit if the head does not announce them."""


async def read_body(
    headers: Iterable[tuple[bytes, bytes]],
    receive: Receive,
    limit: int,
    timeout_s: float,
    *,
    has_arrived: bool = False,
    share: BodyShare | None = None,
) -> bytes:
    """Return the whole body, decoded. Raises as `stream_body`.

    `has_arrived`: the body has arrived already, so that it needs no time limit, and no memory unless it is decoded.
    """
    head = read_body_head(headers, limit)
    if has_arrived and not head.encoding:
        return await read_complete_body(receive, limit)
    if head.encoding or (share is not None and head.length > UNCHARGED_BYTES):
        pieces = _pieces(head.encoding, receive, limit, timeout_s, share)
    else:
        pieces = _arrivals(receive, limit, timeout_s, None)
    parts = [part async for part in pieces]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def stream_body(
    headers: Iterable[tuple[bytes, bytes]],
    receive: Receive,
    limit: int,
    timeout_s: float,
    share: BodyShare | None = None,
) -> AsyncGenerator[bytes, None]:
    """Yield the body as it comes, decoded. Each piece is charged to `share`; the consumer removes what it no longer holds.

    The first bytes have `timeout_s`, and each received byte extends it at `MIN_UPLOAD_RATE`. The consumer's own time counts too.
    Raises RequestTooLarge (without reading on), RequestTimeout, BodyMemoryFull, UnsupportedEncoding, InvalidRequest, CallerDisconnected.
    """
    return _pieces(read_body_head(headers, limit).encoding, receive, limit, timeout_s, share)


async def _pieces(
    encoding: bytes, receive: Receive, limit: int, timeout_s: float, share: BodyShare | None
) -> AsyncGenerator[bytes, None]:
    if encoding and (decoder := BodyDecoder(encoding, limit)).window:
        async for piece in _decoded(decoder, _arrivals(receive, limit, timeout_s, share), share):
            yield piece
        return
    async for data in _arrivals(receive, limit, timeout_s, share):
        if share is not None:
            await share.add(len(data))
        yield data


async def _decoded(
    decoder: BodyDecoder, arrivals: AsyncIterator[bytes], share: BodyShare | None
) -> AsyncGenerator[bytes, None]:
    made = window = 0
    async for data in arrivals:
        for piece in decoder.feed(data):
            made += len(piece)
            if share is not None:
                grown = min(made, decoder.window) - window
                window += grown
                await share.add(len(piece) + grown)
            yield piece
            await asyncio.sleep(0)  # decoding a piece may take long: other tasks get their turn
    decoder.finish()
    if share is not None:
        share.remove(window)


async def _arrivals(
    receive: Receive, limit: int, timeout_s: float, share: BodyShare | None
) -> AsyncGenerator[bytes, None]:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    size, more = 0, True
    while more:
        waited_s = share.waited_s if share is not None else 0.0
        try:
            async with asyncio.timeout_at(deadline + size / MIN_UPLOAD_RATE + waited_s) as timer:
                with share.reading(timer) if share is not None else contextlib.nullcontext():
                    message = await receive()
        except TimeoutError as error:
            raise (share and share.timed_out()) or RequestTimeout(
                f"The request's body did not arrive in time: within {timeout_s:g} s, and a second more for each "
                f"{MIN_UPLOAD_RATE} bytes received."
            ) from error
        if message["type"] == "http.disconnect":
            raise CallerDisconnected
        part = message.get("body", b"")
        more = bool(message.get("more_body"))
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        if part:
            yield part


def read_body_head(headers: Iterable[tuple[bytes, bytes]], limit: int) -> BodyHead:
    """Return what a request's head announces of its body. Raises RequestTooLarge if the announced length exceeds `limit`."""
    encoding, length = b"", limit
    for name, value in headers:
        if name == b"content-length":
            if len(value) > MAX_DIGITS or not value.isdigit() or (length := int(value)) > limit:
                raise _too_large(limit)
        elif name == b"content-encoding":
            encoding = encoding + b"," + value if encoding else value
    return BodyHead(encoding, length)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request's body is larger than the limit of {limit} bytes.")


async def read_complete_body(receive: Receive, limit: int) -> bytes:
    """Return a body that has arrived already. Raises RequestTooLarge, CallerDisconnected."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CallerDisconnected
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body"):
            return part if len(parts) == 1 else b"".join(parts)


def parse_body(body: bytes, schema: type[T]) -> T:
    """Parse a JSON body and validate it by `schema`. Raises InvalidRequest, with `param` if a field is wrong."""
    return parse_normalized(body, schema)[0]


def parse_normalized(body: bytes, schema: type[T]) -> tuple[T, bytes]:
    """Return the validated body, and the bytes to send on, in which integers have no decimal point. Raises as `parse_body`."""
    value = _object(body)
    try:
        return schema.model_validate(value), body
    except ValidationError as error:
        if not _normalize_integers(error, value):
            raise _first_problem(error, value) from error
    return validate_body(value, schema), orjson.dumps(value)


def _object(body: bytes) -> dict[str, Any]:
    if not body:
        raise InvalidRequest("The request has no body. Send a JSON object.")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The request's body is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InvalidRequest("The request's body must be a JSON object.")
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and is_too_deep(value):
        raise InvalidRequest(f"The request's body is nested deeper than {MAX_DEPTH} levels.")
    return value


def validate_body(value: dict[str, Any], schema: type[T]) -> T:
    """Validate `value` by `schema`. Raises InvalidRequest, with `param` if a field is wrong."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        if not _normalize_integers(error, value):
            raise _first_problem(error, value) from error
    return validate_body(value, schema)


def _normalize_integers(error: ValidationError, body: Any) -> bool:
    """Replace `86.0` by `86` in integer fields, which JSON Schema does not tell apart. Returns whether there was one."""
    found = False
    for problem in error.errors(include_url=False, include_context=False):
        number = problem["input"]
        if problem["type"] != "int_type" or not isinstance(number, float):
            continue
        if not number.is_integer() or abs(number) >= MAX_INTEGER:
            continue
        *outer, last = _path_steps(problem, body)
        holder = body
        for step in outer:
            holder = holder[step]
        holder[last] = int(number)
        found = True
    return found


def is_too_deep(value: Any) -> bool:
    """Return whether JSON is nested deeper than `MAX_DEPTH` levels."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def _first_problem(error: ValidationError, body: Any) -> NexusError:
    """Return the error for the first wrong field; for a union, with the errors of its deepest branches."""
    problems = error.errors(include_url=False, include_context=False)
    places = [_field_path(problem, body) for problem in problems]
    first = places[0]
    deepest = max((place for place in places if place[: len(first)] == first), key=len)
    complaints = dict.fromkeys(p["msg"] for p, place in zip(problems, places, strict=True) if place == deepest)
    message = " or ".join(complaints).replace(" or Input should be ", " or ")
    param = ".".join(deepest) or None
    return InvalidRequest(f"{message}: '{param}'" if param else message, param=param)


def _field_path(problem: ErrorDetails, body: Any) -> tuple[str, ...]:
    """Return the path of a wrong field: pydantic's location without the branches of unions (`prompt.list[int].0`)."""
    place = [str(step) for step in _path_steps(problem, body)]
    if problem["type"] == "missing":
        place.append(str(problem["loc"][-1]))
    return tuple(place)


def _path_steps(problem: ErrorDetails, body: Any) -> list[str | int]:
    steps: list[str | int] = []
    for part in problem["loc"]:
        if body is problem["input"]:
            break
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if inside:
            body = body[part]
            steps.append(part)
    return steps


_NAME = re.compile(DISPLAY_NAME)

Name = Annotated[str, Field(json_schema_extra={"minLength": 1, "maxLength": MAX_NAME_LENGTH, "pattern": DISPLAY_NAME})]
"""A name that `check_name` accepts, as the OpenAPI document describes it."""


async def read_json(request: Request, schema: type[T]) -> T:
    """Read a small JSON body and validate it by `schema`. Raises InvalidRequest, RequestTooLarge, RequestTimeout."""
    return parse_body(await _read_small(request, MAX_JSON_BYTES), schema)


async def read_form(request: Request) -> dict[str, str]:
    """Read a small URL-encoded form; of a repeated field the first value. Raises InvalidRequest, RequestTooLarge, RequestTimeout."""
    if not request.headers.get("content-type", "").lower().startswith(FORM_TYPE):
        raise InvalidRequest(f"The body must be a form: {FORM_TYPE}.")
    body = await _read_small(request, MAX_FORM_BYTES)
    try:
        fields = parse_qs(body.decode(), max_num_fields=MAX_FORM_FIELDS)
    except ValueError:
        raise InvalidRequest("The form is malformed, or has too many fields.") from None
    return {name: values[0] for name, values in fields.items()}


async def _read_small(request: Request, limit: int) -> bytes:
    try:
        return await read_body(request.scope["headers"], request.receive, limit, JSON_TIMEOUT_S)
    except CallerDisconnected:
        raise InvalidRequest("The request's body is not complete: the connection was closed.") from None


def check_name(name: str, what: str, param: str) -> str:
    """Return `name` if it can be a key of the registry and one line on a terminal. Raises InvalidRequest."""
    if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{what} is 1 to {MAX_NAME_LENGTH} printable characters without blanks around it, not {name[:100]!r}",
            param=param,
        )
    return name
