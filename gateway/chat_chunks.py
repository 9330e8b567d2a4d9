"""Read the chunks of a chat stream, as workers send them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from schemas.errors import BackendFailed

JSON = dict[str, Any]


def read_chunks(data: bytes) -> Iterator[JSON]:
    """Yield the JSON objects in the `data:` lines of complete frames. Raises BackendFailed."""
    for frame in data.split(b"\n\n"):
        text = b"\n".join(line[5:].strip() for line in frame.splitlines() if line.startswith(b"data:"))
        if not text or text == b"[DONE]":
            continue
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise BackendFailed(
                "The inference server's stream contains an event that is not JSON. Check the worker's server."
            ) from error
        if not isinstance(value, dict):
            raise BackendFailed(
                "The inference server's stream contains an event that is not a JSON object. Check the worker's server."
            )
        yield value


def call_index(call: JSON, known: int) -> int:
    """Return which tool call of an answer a piece belongs to. `known`: how many calls there are so far."""
    index = call.get("index")
    if isinstance(index, int):
        return index
    return known if call.get("id") else max(known - 1, 0)
