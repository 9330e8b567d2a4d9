"""What distinguishes one inference endpoint from another, as data: a new endpoint is a route file and a schema file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import BaseModel

from gateway.model_catalog import ModelCatalog
from schemas.errors import ErrorInfo
from schemas.jobs import Capability, Lane
from schemas.keys import Scope

DONE = b"data: [DONE]\n\n"
SSE = b"text/event-stream; charset=utf-8"
LANE_OF_TIER = {"priority": Lane.PRIORITY, "flex": Lane.FLEX}
"""Every other `service_tier` is the default lane."""


def sse_if_asked(request: Any) -> bytes | None:
    """Server-sent events for `stream: true`, else the answer in one piece."""
    return SSE if request.stream else None


def never_streamed(_request: Any) -> bytes | None:
    """The answer always comes in one piece."""
    return None


def model_named(request: Any, catalog: ModelCatalog, capability: Capability) -> str:
    """The model that the request names; where it names none, the default for the capability."""
    name: str | None = request.model
    return name or catalog.default(capability)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One OpenAI endpoint whose requests become jobs."""

    path: str
    capability: Capability
    schema: type[BaseModel]
    """Checks the fields that Nexus reads; must have `model`, `stream` and `service_tier`."""
    files: tuple[str, ...] = ()
    """Takes a multipart form with files in these fields, the first of which must be there; empty: takes JSON."""
    stream_type: Callable[[Any], bytes | None] = sse_if_asked
    """The content type of an answer that is passed on as it is made; None: the answer comes in one piece."""
    target: Callable[[Any, ModelCatalog, Capability], str] = model_named
    """Whose queue the request goes to. Raises InvalidRequest."""
    by_url: Callable[[Any], bool] = lambda _request: False
    """Whether results are fetched by URL: the answer then holds `data[].url`."""
    scope: Scope = Scope.INFERENCE
    """What a key must be for."""


def error_frame(info: ErrorInfo) -> bytes:
    """What ends a stream that failed after it began. No `[DONE]` follows: a clean end reads as success to SDKs."""
    return b"data: %b\n\n" % orjson.dumps(info.body())


def comment_frame(position: int) -> bytes:
    """Keeps a queued stream's connection alive; SSE clients skip it."""
    return b": queued position=%d\n\n" % position


def adapted_frame(parameters: tuple[str, ...]) -> bytes:
    """Return the comment that names what was replaced in a request, for a stream whose head has left already."""
    return b": x-nexus-adapted: %b\n\n" % ", ".join(parameters).encode()


def progress_frame(progress: bytes) -> bytes:
    """How far the backend is, as a comment: `progress` is `schemas.frames.Progress` as JSON, told without its preview."""
    told = orjson.loads(progress)
    told.pop("preview", None)
    return b": progress %b\n\n" % orjson.dumps(told)
