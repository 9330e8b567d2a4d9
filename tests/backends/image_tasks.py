"""Requests for pictures, and what is in the answers to them."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

from PIL import Image

from schemas.jobs import Capability
from workers.backends.base import Chunk, Task, UploadedFile


def image_task(model: str, *, files: tuple[UploadedFile, ...] = (), stream: bool = False, **fields: Any) -> Task:
    path = "/v1/images/edits" if files else "/v1/images/generations"
    body = {"model": model, "prompt": "a cat", **fields}
    return Task("job_1", "req_1", Capability.IMAGES, path, model, model, stream, json.dumps(body).encode(), files)


def file_of(field: str, data: bytes) -> UploadedFile:
    async def pieces() -> AsyncIterator[bytes]:
        yield data

    return UploadedFile(field, f"{field}.png", "image/png", len(data), pieces)


def answer_of(chunks: list[Chunk]) -> dict[str, Any]:
    return json.loads(b"".join(chunk.data for chunk in chunks))


def image_of(picture: dict[str, Any]) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(picture["b64_json"])))


def events_of(chunks: list[Chunk]) -> list[tuple[str, dict[str, Any]]]:
    """The names and data of server-sent events."""
    frames = b"".join(chunk.data for chunk in chunks).decode().split("\n\n")
    assert frames.pop() == ""
    found = []
    for frame in frames:
        name, data = frame.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def picture_bytes(size: tuple[int, int], kind: str = "PNG", mode: str = "RGB", color: Any = (200, 100, 50)) -> bytes:
    out = BytesIO()
    Image.new(mode, size, color).save(out, kind)
    return out.getvalue()
