"""An OpenAI-style server as the parts of its adapters see it: one call, one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from workers.adapter_kit.error_mapping import refusal
from workers.adapter_kit.http_client import HttpClient, Response, until_close
from workers.adapter_kit.limitations import Limitations
from workers.adapter_kit.multipart import Encoded
from workers.adapter_kit.sse import EventTooLarge, SseSplitter, is_json_content_type
from workers.backends.base import BackendError

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
    limitations: Limitations = field(default_factory=Limitations)
    """What its models lack, by probes."""
    ways: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Which of the known ways of reranking each model has, and until when that counts."""
    voices: dict[str, str] = field(default_factory=dict)
    """A voice of each model whose voices the server lists."""

    async def post(self, path: str, body: JSON | Encoded, *, root: str | None = None) -> Response:
        """The answer, where its status is 200; whoever asked closes it. Raises BackendError for any other.

        When this is cancelled while the server works on its answer, it ends only when that work has: few servers stop for
        a caller who hangs up. A second cancellation hangs up.
        """
        response = await _finished(self.send((self.path if root is None else root) + path, body))
        if response.status == 200:
            return response
        try:
            raise self.refuse(response.status, response.headers, await response.read_all(ERROR_LIMIT))
        finally:
            response.close()

    async def whole(
        self, path: str, body: JSON | Encoded, limit: int, *, root: str | None = None
    ) -> tuple[Response, bytes]:
        """As `post`, with the answer's body of at most `limit` bytes."""
        response = await self.post(path, body, root=root)
        try:
            return response, await response.read_all(limit)
        finally:
            response.close()

    async def send(self, path: str, body: JSON | Encoded) -> Response:
        """The answer, whatever its status; `path` begins at the server's root."""
        if not isinstance(body, Encoded):
            return await self.client.request("POST", path, orjson.dumps(body))
        return await self.client.request(
            "POST", path, content_type=body.content_type, pieces=body.pieces(), length=body.length
        )


async def _finished(sending: Coroutine[Any, Any, Response]) -> Response:
    work = asyncio.create_task(sending)
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
    """What the server gets of the caller's fields; one that is null counts as not given, which not every server knows."""
    return {name: value for name, value in body.items() if value is not None and name not in OWN_FIELDS} | {
        "model": model
    }


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
    return error.info.status in (400, 422) and names(error, *words)


def names(error: BackendError, *words: str) -> bool:
    """Whether an error names one of these fields or values, in lower case."""
    said = f"{error.info.param or ''} {error.info.message}".lower()
    return any(word in said for word in words)


def is_json(response: Response) -> bool:
    """Whether an answer says that it is JSON."""
    return is_json_content_type(response.headers.get("content-type", ""))


def is_events(response: Response) -> bool:
    """Whether an answer says that it is a stream of events."""
    return response.headers.get("content-type", "").lower().startswith("text/event-stream")


async def events_of(response: Response, limit: int) -> AsyncIterator[bytes]:
    """The events as they come, each block of them with its empty line; b"" where one is not complete yet."""
    splitter = SseSplitter(limit)
    try:
        while data := await response.read():
            yield splitter.feed(data)
        yield splitter.feed(b"\n\n")  # the last event may lack its empty line
    except EventTooLarge as error:
        raise BackendError(str(error)) from error
