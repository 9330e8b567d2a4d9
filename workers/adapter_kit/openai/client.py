"""A client of an OpenAI-style server, and the reading of its responses, for the parts of an adapter."""

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
"""Fields that Nexus itself reads, such as the lane; a server must not get them."""

ErrorFactory = Callable[[int, Mapping[str, str], bytes], BackendError]


@dataclass(slots=True)
class OpenAIClient:
    """Sends requests to one server, and holds what probes have learned about it."""

    http: HttpClient
    base_path: str
    """The path of its API: `/v1`."""
    make_error: ErrorFactory = error_from_response
    """Makes the error for a response whose status is not 200."""
    limitations: ModelLimitations = field(default_factory=ModelLimitations)
    """The features that its models lack, by probes."""
    rerank_routes: dict[str, tuple[int, float]] = field(default_factory=dict)
    """The reranking route of each model, and until when that counts."""
    voices: dict[str, str] = field(default_factory=dict)
    """One voice of each model whose voices the server lists."""
    declared_lacks: frozenset[str] = frozenset()
    """Parameters of text requests that no model honors, by the operator."""
    resident: frozenset[str] | None = None
    """The models that the server held in memory at the last poll; None where the server does not report them."""
    redact: Callable[[bytes], bytes] | None = None
    """Removes secrets from an answer to a request for text that came in one piece."""

    async def post(self, path: str, body: JSON | MultipartForm, *, root: str | None = None) -> BackendResponse:
        """Return the response, whose status is 200; the caller closes it. Raises BackendError for any other status.

        A call that is cancelled while the server works ends only when that work has ended: few servers stop for a client
        that disconnects. A second cancellation disconnects.
        """
        response = await _finish_before_cancel(self.send((self.base_path if root is None else root) + path, body))
        if response.status == 200:
            return response
        try:
            raise self.make_error(response.status, response.headers, await response.read_all(ERROR_LIMIT))
        finally:
            response.close()

    async def post_and_read(
        self, path: str, body: JSON | MultipartForm, limit: int, *, root: str | None = None
    ) -> tuple[BackendResponse, bytes]:
        """Return the response as `post` does, with its body of at most `limit` bytes."""
        response = await self.post(path, body, root=root)
        try:
            return response, await response.read_all(limit)
        finally:
            response.close()

    async def send(self, path: str, body: JSON | MultipartForm) -> BackendResponse:
        """Return the response with any status; `path` begins at the server's root."""
        if not isinstance(body, MultipartForm):
            return await self.http.request("POST", path, orjson.dumps(body))
        return await self.http.request(
            "POST", path, content_type=body.content_type, pieces=body.pieces(), length=body.length
        )


async def _finish_before_cancel(sending: Coroutine[Any, Any, BackendResponse]) -> BackendResponse:
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
    """Return the caller's fields for the server, without those that are null, which not every server accepts."""
    return {name: value for name, value in body.items() if value is not None and name not in NEXUS_FIELDS} | {
        "model": model
    }


def form_fields(fields: JSON) -> list[tuple[str, str]]:
    """Return a form's fields as texts; a list becomes `name[]`, once for each of its items."""
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
    """Parse a response's JSON. Raises BackendError, transient where the body may have been cut short unnoticed."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BackendError(
            "the backend's answer is not JSON", transient=ends_with_connection(response.headers)
        ) from error


def rejects_parameter(error: BackendError, *words: str) -> bool:
    """Return whether an error rejects one of these fields or values."""
    return error.info.status in (400, 422) and mentions(error, *words)


def mentions(error: BackendError, *words: str) -> bool:
    """Return whether an error names one of these fields or values, which are in lower case."""
    message = f"{error.info.param or ''} {error.info.message}".lower()
    return any(word in message for word in words)


def is_json_response(response: BackendResponse) -> bool:
    """Return whether a response has a content type of JSON."""
    return is_json_content_type(response.headers.get("content-type", ""))


def is_event_stream(response: BackendResponse) -> bool:
    """Return whether a response has the content type of an event stream."""
    return response.headers.get("content-type", "").lower().startswith("text/event-stream")


async def read_events(response: BackendResponse, limit: int) -> AsyncIterator[bytes]:
    """Yield blocks of complete events, each with its empty line; b"" while an event is incomplete."""
    splitter = SseSplitter(limit)
    try:
        while data := await response.read():
            yield splitter.feed(data)
        yield splitter.feed(b"\n\n")  # the last event may lack its empty line
    except EventTooLarge as error:
        raise BackendError(str(error)) from error
