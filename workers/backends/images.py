"""Pictures as OpenAI's answers: what every image adapter shares.

An adapter reads `ImageRequest.of(task)`, refuses by `request.allow(…)` what it cannot honour, and hands `answer` what it makes:

    async with aclosing(answer(task, request, self._pictures(task, request))) as outputs:
        async for output in outputs:
            yield output

Closing it closes `_pictures`, which MUST stop the server, as `base` says of `run`.
"""

from __future__ import annotations

import base64
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import orjson

from schemas.events import Progress
from workers.backends.base import BackendError, Chunk, Finish, Output, Task
from workers.backends.image_formats import cleaned, content_type_of, converted, edit_area, preview_of, size_of
from workers.backends.image_requests import EDITS, GENERATIONS, ImageRequest

__all__ = [
    "EDITS",
    "GENERATIONS",
    "KEEP_METADATA",
    "ImageRequest",
    "Picture",
    "answer",
    "authorization",
    "content_type_of",
    "edit_area",
    "keeps_metadata",
    "preview_of",
    "size_of",
]

PIECE = 192 * 1024
"""Bytes of a picture that make one piece of 256 KiB in base64; divisible by three, so that the pieces join."""
CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
KEEP_METADATA = "keep_metadata"
"""The option of image adapters that leaves in pictures what their server writes into them."""
NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""OpenAI's closing event must have a usage; these servers count no tokens."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, or a preview of one."""

    data: bytes
    content_type: str = ""
    """What counts where its first bytes say nothing."""
    seed: int | None = None
    final: bool = True
    """False: a preview, of which streams show as many as the caller asked for."""
    index: int = 0
    """Which of the request's `n`."""
    revised_prompt: str | None = None


def keeps_metadata(options: Mapping[str, str]) -> bool:
    """Return whether the operator wants metadata kept. Raises ValueError for anything but `true` and `false`."""
    keep = options.get(KEEP_METADATA, "false").lower()
    if keep not in ("true", "false"):
        raise ValueError(f"the option {KEEP_METADATA} is true or false")
    return keep == "true"


def authorization(api_key: str) -> dict[str, str]:
    """The header for a server's key; `USER:PASSWORD` is HTTP's basic scheme."""
    if not api_key:
        return {}
    if ":" in api_key:
        return {"authorization": f"Basic {base64.b64encode(api_key.encode()).decode()}"}
    return {"authorization": f"Bearer {api_key}"}


async def answer(
    task: Task, request: ImageRequest, pictures: AsyncIterator[Progress | Picture], *, keep_metadata: bool = False
) -> AsyncGenerator[Output]:
    """`pictures` as OpenAI answers: one JSON body, or events for a caller who streams; then `Finish`.

    Unless `keep_metadata`, pictures go out without what their server wrote into them: workflows, prompts, parameters.

    Bytes are at most one picture's, and go out in pieces of 256 KiB. Previews that are not wanted are dropped. Raises
    BackendError when fewer than `n` pictures came.
    """
    form = _Stream(request, keep_metadata) if task.stream else _Body(task, request, keep_metadata)
    made = 0
    async with aclosing(cast("AsyncGenerator[Progress | Picture]", pictures)):
        async for item in pictures:
            if isinstance(item, Progress):
                form.note(item)
                yield item
            elif item.final:
                made += 1
                async for chunk in form.picture(item):
                    yield chunk
            else:
                async for chunk in form.preview(item):
                    yield chunk
    if made < request.n:
        raise BackendError(f"the backend made {made} of {request.n} pictures")
    for chunk in form.end():
        yield chunk
    yield Finish(content_type="text/event-stream" if task.stream else "application/json")


class _Form(ABC):
    def __init__(self, request: ImageRequest, keep_metadata: bool) -> None:
        self.request = request
        self.keep_metadata = keep_metadata
        self.created = int(time.time())
        self.content_type = CONTENT_TYPES[request.output_format]

    def note(self, progress: Progress) -> None:
        """Hear how far the work is."""

    async def preview(self, _picture: Picture) -> AsyncIterator[Chunk]:
        """What there is so far."""
        return
        yield

    @abstractmethod
    def picture(self, picture: Picture) -> AsyncIterator[Chunk]:
        """A picture that is done."""

    def end(self) -> Iterator[Chunk]:
        return iter(())

    async def converted(self, picture: Picture) -> bytes:
        """The picture's bytes in the format that was asked for."""
        request = self.request
        content_type = content_type_of(picture.data) or picture.content_type
        if content_type == self.content_type and request.output_compression in (None, 100):
            return picture.data if self.keep_metadata else await cleaned(picture.data)
        return await converted(picture.data, request.output_format, request.output_compression)

    async def size(self, data: bytes) -> str:
        size = await size_of(data)
        return f"{size[0]}x{size[1]}" if size else self.request.size or "auto"


class _Body(_Form):
    """`{"created", "data": [{"b64_json" or "url", "seed", "revised_prompt"}], "output_format", "size"}`."""

    def __init__(self, task: Task, request: ImageRequest, keep_metadata: bool) -> None:
        super().__init__(request, keep_metadata)
        self._task = task
        self._size: str | None = None

    async def picture(self, picture: Picture) -> AsyncIterator[Chunk]:
        data = await self.converted(picture)
        lead = b"," if self._size else b'{"created":%d,"data":[' % self.created
        self._size = self._size or await self.size(data)
        more: dict[str, Any] = {"seed": picture.seed, "revised_prompt": picture.revised_prompt}
        more = {name: value for name, value in more.items() if value is not None}
        if self.request.response_format == "url":
            url = await self._task.keep(data, self.content_type)
            yield Chunk(lead + orjson.dumps({"url": url, **more}))
            return
        for piece in _with_base64(lead, data, more):
            yield piece

    def end(self) -> Iterator[Chunk]:
        tail = {"output_format": self.request.output_format, "size": self._size}
        yield Chunk(b"]," + orjson.dumps(tail)[1:], 0)


class _Stream(_Form):
    """`image_generation.partial_image` and `image_generation.completed`, or `image_edit.…`, as server-sent events.

    Previews are spread over the work: the first of two comes after a third of it, where the backend says how far it is.
    """

    def __init__(self, request: ImageRequest, keep_metadata: bool) -> None:
        super().__init__(request, keep_metadata)
        self._kind = "image_edit" if request.edit else "image_generation"
        self._shown = 0
        self._fraction: float | None = None

    def note(self, progress: Progress) -> None:
        if progress.phase == "run":
            self._fraction = progress.fraction

    async def preview(self, picture: Picture) -> AsyncIterator[Chunk]:
        wanted = self.request.partial_images
        if self._shown >= wanted:
            return
        if self._fraction is not None and self._fraction * (wanted + 1) < self._shown + 1:
            return
        index, self._shown = self._shown, self._shown + 1
        for piece in await self._event("partial_image", picture, {"partial_image_index": index}):
            yield piece

    async def picture(self, picture: Picture) -> AsyncIterator[Chunk]:
        more = {"usage": NO_USAGE} | ({"seed": picture.seed} if picture.seed is not None else {})
        for piece in await self._event("completed", picture, more):
            yield piece

    async def _event(self, kind: str, picture: Picture, more: dict[str, Any]) -> Iterator[Chunk]:
        data = await self.converted(picture)
        name = f"{self._kind}.{kind}"
        fields = {
            "type": name,
            "background": self.request.extra.get("background", "auto"),
            "created_at": int(time.time()),
            "output_format": self.request.output_format,
            "quality": self.request.extra.get("quality", "auto"),
            "size": await self.size(data),
            **more,
        }
        return _with_base64(f"event: {name}\ndata: ".encode(), data, fields, b"\n\n")


def _with_base64(lead: bytes, data: bytes, more: dict[str, Any], tail: bytes = b"") -> Iterator[Chunk]:
    """`lead`, an object of `b64_json` and `more`, `tail`: in pieces. One picture counts as one token."""
    rest = orjson.dumps(more)
    yield Chunk(lead + b'{"b64_json":"')
    for start in range(0, len(data), PIECE):
        yield Chunk(base64.b64encode(data[start : start + PIECE]), 0)
    yield Chunk(b'"' + (b"," + rest[1:] if more else b"}") + tail, 0)
