"""Make the events and comments that a stream of server-sent events holds beside the backend's own."""

from __future__ import annotations

import orjson

from schemas.errors import ErrorInfo

EVENT_STREAM = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"


def error_frame(info: ErrorInfo) -> bytes:
    """Return the event that ends a failed stream. No `[DONE]` follows it: SDKs would take that for success."""
    return b"data: %b\n\n" % orjson.dumps(info.body())


def comment_frame(position: int) -> bytes:
    """Return the comment with a queued request's position, which keeps the connection alive; SSE clients skip comments."""
    return b": queued position=%d\n\n" % position


def adapted_frame(parameters: tuple[str, ...]) -> bytes:
    """Return the comment that names adapted parameters, for a stream whose head was sent before they were known."""
    return b": x-nexus-adapted: %b\n\n" % ", ".join(parameters).encode()


def progress_frame(progress: bytes) -> bytes:
    """Return the SSE comment for `progress`, a `schemas.frames.Progress` as JSON, without its preview."""
    fields = orjson.loads(progress)
    fields.pop("preview", None)
    return b": progress %b\n\n" % orjson.dumps(fields)
