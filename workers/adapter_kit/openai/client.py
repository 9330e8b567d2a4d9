"""An OpenAI-style server as the parts of its adapters see it: one call, one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from workers.adapter_kit.error_mapping import error_from_response
from workers.adapter_kit.http_client import BackendResponse, HttpClient, ends_with_connection
from workers.adapter_kit.limitations import ModelLimitations
from workers.adapter_kit.multipart import MultipartForm
from workers.adapter_kit.sse import EventTooLarge, SseSplitter, is_json_content_type
from workers.backends.base import BackendError

JSON = dict[str, Any]

ERROR_LIMIT = 1024 * 1024
NEXUS_FIELDS = ("service_tier",)
"""Chose the lane in Nexus; a server behind it must not take it for its own."""

ErrorFactory = Callable[[int, Mapping[str, str], bytes], BackendError]


@dataclass(slots=True)
class OpenAIClient:
    """The server, and what was learned about it."""

    http: HttpClient
    base_path: str
    """Where its API lies: `/v1`."""
    make_error: ErrorFactory = error_from_response
    """The error for an answer whose status is not 200."""
    limitations: ModelLimitations = field(default_factory=ModelLimitations)
    """What its models lack, by probes."""
    rerank_routes: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Which of the known ways of reranking each model has, and until when that counts."""
    voices: dict[str, str] = field(default_factory=dict)
    """A voice of each model whose voices the server lists."""

    async def post(self, path: str, body: JSON | MultipartForm, *, root: str | None = None) -> BackendResponse:
        """The answer, where its status is 200; whoever asked closes it. Raises BackendError for any other.

        When this is cancelled while the server works on its answer, it ends only when that work has: few servers stop for
        a caller who hangs up. A second cancellation hangs up.
        """
        response = await _finished(self.send((self.base_path if root is None else root) + path, body))
        if response.status == 200:
            return response
        try:
            raise self.make_error(response.status, response.headers, await response.read_all(ERROR_LIMIT))
        finally:
            response.close()

    async def post_and_read(
        self, path: str, body: JSON | MultipartForm, limit: int, *, root: str | None = None
    ) -> tuple[BackendResponse, bytes]:
        """As `post`, with the answer's body of at most `limit` bytes."""
        response = await self.post(path, body, root=root)
        try:
            return response, await response.read_all(limit)
        finally:
            response.close()

    async def send(self, path: str, body: JSON | MultipartForm) -> BackendResponse:
        """The answer, whatever its status; `path` begins at the server's root."""
        if not isinstance(body, MultipartForm):
            return await self.http.request("POST", path, orjson.dumps(body))
        return await self.http.request(
            "POST", path, content_type=body.content_type, pieces=body.pieces(), length=body.length
        )


async def _finished(sending: Coroutine[Any, Any, BackendResponse]) -> BackendResponse:
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


def forwarded_fields(body: JSON, model: str) -> JSON:
    """What the server gets of the caller's fields; one that is null counts as not given, which not every server knows."""
    return {name: value for name, value in body.items() if value is not None and name not in NEXUS_FIELDS} | {
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


def parse_json_response(response: BackendResponse, data: bytes) -> Any:
    """An answer's JSON. Raises BackendError: transient where it may have been cut short unnoticed."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BackendError(
            "the backend's answer is not JSON", transient=ends_with_connection(response.headers)
        ) from error


def rejects_parameter(error: BackendError, *words: str) -> bool:
    """Whether a refusal is about one of these fields or values."""
    return error.info.status in (400, 422) and mentions(error, *words)


def mentions(error: BackendError, *words: str) -> bool:
    """Whether an error names one of these fields or values, in lower case."""
    said = f"{error.info.param or ''} {error.info.message}".lower()
    return any(word in said for word in words)


def is_json_response(response: BackendResponse) -> bool:
    """Whether an answer says that it is JSON."""
    return is_json_content_type(response.headers.get("content-type", ""))


def is_event_stream(response: BackendResponse) -> bool:
    """Whether an answer says that it is a stream of events."""
    return response.headers.get("content-type", "").lower().startswith("text/event-stream")


async def read_events(response: BackendResponse, limit: int) -> AsyncIterator[bytes]:
    """The events as they come, each block of them with its empty line; b"" where one is not complete yet."""
    splitter = SseSplitter(limit)
    try:
        while data := await response.read():
            yield splitter.feed(data)
        yield splitter.feed(b"\n\n")  # the last event may lack its empty line
    except EventTooLarge as error:
        raise BackendError(str(error)) from error
