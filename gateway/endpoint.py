"""What distinguishes one inference endpoint from another, as data: a new endpoint is a route file and a schema file."""

from __future__ import annotations

from dataclasses import dataclass

import orjson
from pydantic import BaseModel

from schemas.errors import ErrorInfo
from schemas.jobs import Capability

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One OpenAI endpoint whose requests become jobs."""

    path: str
    capability: Capability
    schema: type[BaseModel]
    """Checks the fields that Nexus reads; must have `model`."""


def error_frame(info: ErrorInfo) -> bytes:
    """What ends a stream that failed after it began. No `[DONE]` follows: a clean end reads as success to SDKs."""
    return b"data: %b\n\n" % orjson.dumps(info.body())


def comment_frame(position: int) -> bytes:
    """Keeps a queued stream's connection alive; SSE clients skip it."""
    return b": queued position=%d\n\n" % position
