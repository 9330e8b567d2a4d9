"""Images as OpenAI's answers, for every image adapter.

An adapter reads `ImageRequest.from_task(task)`, refuses with `request.require_supported(…)` the features that it lacks, and passes the images that it
makes to `respond_with_images`:

    async with aclosing(answer(task, request, self._pictures(task, request))) as outputs:
        async for output in outputs:
            yield output

Closing the generator closes `_pictures`, which MUST stop the server, as `base` requires of `run`.
"""

from __future__ import annotations

import base64
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from schemas.frames import Progress
from schemas.usage import MediaUsage
from workers.adapter_kit.images.formats import (
    convert_image,
    detect_content_type,
    make_edit_mask,
    make_preview,
    read_size,
    strip_metadata,
)
from workers.adapter_kit.images.requests import EDITS, GENERATIONS, ImageRequest
from workers.adapter_kit.options import parse_flag
from workers.backends.base import Adaptation, BackendError, Chunk, Finish, Output, Task

__all__ = [
    "EDITS",
    "GENERATIONS",
    "KEEP_METADATA",
    "GeneratedImage",
    "ImageRequest",
    "authorization_header",
    "detect_content_type",
    "make_edit_mask",
    "make_preview",
    "parse_keep_metadata",
    "read_size",
    "respond_with_images",
]

PIECE_BYTES = 192 * 1024
"""Bytes of an image that make one piece of 256 KiB in base64; divisible by three, so that the pieces can be joined."""
CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
KEEP_METADATA = "keep_metadata"
"""The option of image adapters that keeps the metadata which the server writes into images."""
FORMATS = {content_type: name for name, content_type in CONTENT_TYPES.items()}
OPENAI_VALUES = {
    "size": frozenset({"1024x1024", "1024x1536", "1536x1024"}),
    "quality": frozenset({"low", "medium", "high"}),
    "background": frozenset({"transparent", "opaque"}),
}
"""The values of these fields in OpenAI's answers; strict clients reject any other value."""
BASE64_DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
HEAD_BYTES = 48 * 1024
"""Bytes of an encoded image that are decoded to read its format and size; divisible by three."""
OWN_FIELDS = frozenset({"created", "data", "size", "quality", "background", "output_format"})
"""Fields of an answer that are made here, and not passed on from the server."""
ZERO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""OpenAI's closing event must have a usage; image servers count no tokens."""


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """An image that a server has made, or a preview of one."""

    data: bytes
    content_type: str = ""
    """The content type, where the first bytes do not show it."""
    seed: int | None = None
    final: bool = True
    """False: a preview; a stream shows as many as the caller requested."""
    index: int = 0
    """The number of the image among the request's `n`, from 0."""
    revised_prompt: str | None = None
    extra_fields: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the server's answer that are passed on with the image."""
    in_requested_format: bool = False
    """The server was asked for the format and compression: an image of that format, or any where the caller named none, is not converted."""
    encoded: bytes = b""
    """The image as the server encoded it, in place of `data`: valid base64, which is decoded only where the image must change."""

    def decode(self) -> bytes:
        """Return the image's bytes."""
        return base64.b64decode(self.encoded) if self.encoded else self.data

    def head(self) -> bytes:
        """Return the beginning of the image's bytes, or all of them."""
        return base64.b64decode(self.encoded[: HEAD_BYTES // 3 * 4]) if self.encoded else self.data

    async def size(self) -> str | None:
        """Return the image's size as `WIDTHxHEIGHT`; None where it cannot be read."""
        size = await format_size(self.head())
        if size is None and len(self.encoded) > HEAD_BYTES // 3 * 4:
            return await format_size(self.decode())  # metadata fills the head
        return size


def parse_keep_metadata(options: Mapping[str, str]) -> bool:
    """Return whether the operator wants metadata kept. Raises ValueError for anything but `true` and `false`."""
    return parse_flag(options, KEEP_METADATA)


def authorization_header(api_key: str) -> dict[str, str]:
    """Return the header for a server's key; `USER:PASSWORD` makes HTTP's basic scheme."""
    if not api_key:
        return {}
    if ":" in api_key:
        return {"authorization": f"Basic {base64.b64encode(api_key.encode()).decode()}"}
    return {"authorization": f"Bearer {api_key}"}


async def respond_with_images(
    task: Task,
    request: ImageRequest,
    pictures: AsyncIterator[Progress | Adaptation | GeneratedImage],
    server_fields: MutableMapping[str, Any] | None = None,
    *,
    keep_metadata: bool = False,
) -> AsyncGenerator[Output]:
    """Yield `pictures` as OpenAI answers: one JSON body, or events for a caller who streams; then `Finish`.

    Unless `keep_metadata`, images leave without the server's metadata: workflows, prompts, parameters. At most one image is in
    memory, and leaves in pieces of 256 KiB. Previews that the caller does not want are dropped.

    `server_fields`: the other fields of the server's answer, complete once all images have come; values that OpenAI does not have
    are left out. Raises BackendError when fewer than `n` images came.
    """
    writer = (
        _EventImageWriter(request, keep_metadata)
        if task.stream
        else _JsonImageWriter(task, request, keep_metadata, {} if server_fields is None else server_fields)
    )
    made = 0
    async with aclosing(cast("AsyncGenerator[Progress | Adaptation | GeneratedImage]", pictures)):
        async for item in pictures:
            if isinstance(item, Progress):
                writer.note(item)
                yield item
            elif isinstance(item, Adaptation):
                yield item
            elif item.final:
                made += 1
                async for chunk in writer.picture(item):
                    yield chunk
            else:
                async for chunk in writer.preview(item):
                    yield chunk
    if made < request.n:
        raise BackendError(f"the backend made {made} of {request.n} images")
    for chunk in writer.end():
        yield chunk
    content_type = "text/event-stream" if task.stream else "application/json"
    yield Finish(content_type=content_type, media=MediaUsage(images=made, image_size=request.size or ""))


class _ImageWriter(ABC):
    """Writes images in the writer of an answer."""

    def __init__(self, request: ImageRequest, keep_metadata: bool) -> None:
        self.request = request
        self.keep_metadata = keep_metadata
        self.created = int(time.time())
        self.content_type = CONTENT_TYPES[request.output_format]

    def note(self, progress: Progress) -> None:
        """Note the progress of the work."""

    async def preview(self, _picture: GeneratedImage) -> AsyncIterator[Chunk]:
        """Write a preview."""
        return
        yield

    @abstractmethod
    def picture(self, picture: GeneratedImage) -> AsyncIterator[Chunk]:
        """Write a finished image."""

    def end(self) -> Iterator[Chunk]:
        """Write the end of the answer."""
        return iter(())

    def content_type_of(self, picture: GeneratedImage) -> str:
        """Return the content type that the image has now."""
        return detect_content_type(picture.head()) or picture.content_type or "image/png"

    def is_final(self, picture: GeneratedImage, content_type: str) -> bool:
        """Return whether the image is passed on as the server made it, since the server was asked for its format."""
        return picture.in_requested_format and (not self.request.format_given or content_type == self.content_type)

    async def convert(self, picture: GeneratedImage) -> tuple[bytes, str]:
        """Return the image's bytes in the requested format, and their content type."""
        request, data = self.request, picture.decode()
        content_type = self.content_type_of(picture)
        if self.is_final(picture, content_type):
            return data, content_type
        if content_type == self.content_type and request.output_compression in (None, 100):
            return data if self.keep_metadata else await strip_metadata(data), content_type
        return await convert_image(data, request.output_format, request.output_compression), self.content_type


def openai_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `size`, `quality` and `background` whose values OpenAI has."""
    return {name: fields[name] for name, values in OPENAI_VALUES.items() if fields.get(name) in values}


async def format_size(data: bytes) -> str | None:
    """Return the size of an image as `WIDTHxHEIGHT`; None where it cannot be read."""
    size = await read_size(data)
    return f"{size[0]}x{size[1]}" if size else None


class _JsonImageWriter(_ImageWriter):
    """Writes `{"created", "data": [{"b64_json" or "url", "seed", "revised_prompt"}], "output_format", "size", …}`."""

    def __init__(
        self, task: Task, request: ImageRequest, keep_metadata: bool, server_fields: Mapping[str, Any]
    ) -> None:
        super().__init__(request, keep_metadata)
        self._task = task
        self._server_fields = server_fields
        self._begun = False
        self._sizes: set[str | None] = set()
        self._types: set[str] = set()

    async def picture(self, picture: GeneratedImage) -> AsyncIterator[Chunk]:
        content_type, size, coded = self.content_type_of(picture), None, b""
        if picture.encoded and self.request.response_format != "url" and self.is_final(picture, content_type):
            data, coded, size = b"", picture.encoded, await picture.size()
        else:
            data, content_type = await self.convert(picture)
            size = await format_size(data)
        created = self._server_fields.get("created")
        lead = b"," if self._begun else b'{"created":%d,"data":[' % (created if type(created) is int else self.created)
        self._begun = True
        self._sizes.add(size)
        self._types.add(content_type)
        more: dict[str, Any] = {**picture.extra_fields, "seed": picture.seed, "revised_prompt": picture.revised_prompt}
        more = {name: value for name, value in more.items() if value is not None}
        if self.request.response_format == "url":
            url = await self._task.store_file(data, content_type)
            yield Chunk(lead + orjson.dumps({"url": url, **more}))
            return
        for piece in _write_base64(lead, encode_pieces(data) if data else split_base64(coded), more):
            yield piece

    def end(self) -> Iterator[Chunk]:
        rest = {
            name: value for name, value in self._server_fields.items() if name not in OWN_FIELDS and value is not None
        }
        one_size = self._sizes.copy().pop() if len(self._sizes) == 1 else None
        one_type = self._types.copy().pop() if len(self._types) == 1 else ""
        if one_type in FORMATS:
            rest["output_format"] = FORMATS[one_type]
        values = openai_values({**self._server_fields, "size": one_size})
        if one_type == "image/jpeg" and "background" in values:
            values["background"] = "opaque"
        yield Chunk(b"]," + orjson.dumps(rest | values)[1:] if rest or values else b"]}", 0)


class _EventImageWriter(_ImageWriter):
    """Writes `image_generation.partial_image` and `image_generation.completed`, or `image_edit.…`, as server-sent events.

    Previews are spread over the work: the first of two comes after a third of it, where the backend reports progress.
    """

    def __init__(self, request: ImageRequest, keep_metadata: bool) -> None:
        super().__init__(request, keep_metadata)
        self._kind = "image_edit" if request.edit else "image_generation"
        self._preview_count = 0
        self._fraction: float | None = None

    def note(self, progress: Progress) -> None:
        if progress.phase == "run":
            self._fraction = progress.fraction

    async def preview(self, picture: GeneratedImage) -> AsyncIterator[Chunk]:
        wanted = self.request.partial_images
        if self._preview_count >= wanted:
            return
        if self._fraction is not None and self._fraction * (wanted + 1) < self._preview_count + 1:
            return
        index, self._preview_count = self._preview_count, self._preview_count + 1
        for piece in await self._event("partial_image", picture, {"partial_image_index": index}):
            yield piece

    async def picture(self, picture: GeneratedImage) -> AsyncIterator[Chunk]:
        more = {"usage": ZERO_USAGE} | ({"seed": picture.seed} if picture.seed is not None else {})
        for piece in await self._event("completed", picture, more):
            yield piece

    async def _event(self, kind: str, picture: GeneratedImage, more: dict[str, Any]) -> Iterator[Chunk]:
        data, content_type = await self.convert(picture)
        fields = await event_fields(
            f"{self._kind}.{kind}", data, content_type, {**self.request.extra, **picture.extra_fields}
        )
        return image_event(data, {**fields, **more})


async def event_fields(name: str, data: bytes, content_type: str, server_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that OpenAI's events about an image must have, with true values or `auto`."""
    values = openai_values({**server_fields, "size": await format_size(data)})
    return {
        "type": name,
        "background": "auto",
        "created_at": int(time.time()),
        "output_format": FORMATS.get(content_type, "png"),
        "quality": "auto",
        "size": "auto",
        **values,
    }


def image_event(data: bytes, fields: Mapping[str, Any]) -> Iterator[Chunk]:
    """Return an image as one server-sent event, in pieces."""
    return _write_base64(f"event: {fields['type']}\ndata: ".encode(), encode_pieces(data), dict(fields), b"\n\n")


def is_base64(coded: bytes) -> bool:
    """Return whether `coded` is padded base64 without line breaks, in a fifth of the time of decoding it."""
    padding = coded.translate(None, BASE64_DIGITS)
    return len(coded) % 4 == 0 and padding in (b"", b"=", b"==") and coded.endswith(padding)


def encode_pieces(data: bytes) -> Iterator[bytes]:
    """Yield an image in base64."""
    return (base64.b64encode(data[start : start + PIECE_BYTES]) for start in range(0, len(data), PIECE_BYTES))


def split_base64(coded: bytes) -> Iterator[bytes]:
    """Yield base64 in pieces of the size that `encode_pieces` makes."""
    step = PIECE_BYTES // 3 * 4
    return (coded[start : start + step] for start in range(0, len(coded), step))


def _write_base64(lead: bytes, pieces: Iterator[bytes], more: dict[str, Any], tail: bytes = b"") -> Iterator[Chunk]:
    """Yield `lead`, an object of `b64_json` and `more`, and `tail`, in pieces. One image counts as one token."""
    rest = orjson.dumps(more)
    yield Chunk(lead + b'{"b64_json":"')
    for piece in pieces:
        yield Chunk(piece, 0)
    yield Chunk(b'"' + (b"," + rest[1:] if more else b"}") + tail, 0)
