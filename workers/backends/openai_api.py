"""An OpenAI-style server as its adapter's parts for media see it: one call, one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson

from workers.backends.base import BackendError
from workers.backends.multipart import Encoded
from workers.backends.refusals import refusal
from workers.backends.wire import HttpClient, Response, until_close

JSON = dict[str, Any]

ERROR_LIMIT = 1024 * 1024
OWN_FIELDS = ("service_tier",)
"""Chose the lane in Nexus; a server behind it must not take it for its own."""

Refuse = Callable[[int, Mapping[str, str], bytes], BackendError]


@dataclass(slots=True)
class Api:
    """The server, and what was learned about it."""

    client: HttpClient
    path: str
    """Where its API lies: `/v1`."""
    refuse: Refuse = refusal
    """The error for an answer whose status is not 200."""
    lacks: set[tuple[str, str]] = field(default_factory=set)
    """What a model has refused: its name and a format or field."""
    rerank: int | None = None
    """Which of the known ways of reranking it has."""

    @asynccontextmanager
    async def ask(self, path: str, body: JSON | Encoded, *, root: str | None = None) -> AsyncGenerator[Response]:
        """The answer to a POST, where its status is 200. Raises BackendError for any other.

        When this is cancelled while the server works on its answer, it ends only when that work has: few servers stop for
        a caller who hangs up. A second cancellation hangs up. On leaving, an answer that was not read ends.
        """
        where = (self.path if root is None else root) + path
        response = await _finished(self._send(where, body))
        try:
            if response.status != 200:
                raise self.refuse(response.status, response.headers, await response.read_all(ERROR_LIMIT))
            yield response
        finally:
            response.close()

    async def _send(self, path: str, body: JSON | Encoded) -> Response:
        if not isinstance(body, Encoded):
            return await self.client.request("POST", path, orjson.dumps(body))
        return await self.client.request(
            "POST", path, content_type=body.content_type, pieces=body.pieces(), length=body.length
        )


async def _finished(sending: Any) -> Response:
    work: asyncio.Task[Response] = asyncio.ensure_future(sending)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        try:
            await asyncio.wait({work})
        finally:
            work.cancel()
        if not work.cancelled() and work.exception() is None:
            work.result().close()
        raise


def fields_of(body: JSON, model: str) -> JSON:
    """What the server gets of the caller's fields."""
    return {name: value for name, value in body.items() if name not in OWN_FIELDS} | {"model": model}


def form_fields(fields: JSON) -> list[tuple[str, str]]:
    """A form's fields as they are written in one; a list is written as `name[]`, once for each of its items."""
    written: list[tuple[str, str]] = []
    for name, value in fields.items():
        if isinstance(value, list):
            written += [(f"{name}[]", _text(one)) for one in value]
        elif value is not None:
            written.append((name, _text(value)))
    return written


def _text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def json_of(response: Response, data: bytes) -> Any:
    """An answer's JSON. Raises BackendError: transient where it may have been cut short unnoticed."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BackendError("the backend's answer is not JSON", transient=until_close(response.headers)) from error


def is_about(error: BackendError, *words: str) -> bool:
    """Whether a refusal is about one of these fields or values."""
    info = error.info
    said = f"{info.param or ''} {info.message}".lower()
    return info.status in (400, 422) and any(word in said for word in words)


async def pieces_of(response: Response) -> AsyncIterator[bytes]:
    """The body, as it comes."""
    while data := await response.read():
        yield data
