"""`/v1/images/generations` and `/v1/images/edits` of an OpenAI-style server."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import orjson

from schemas.usage import MediaUsage
from workers.adapter_kit.error_mapping import error_from_payload
from workers.adapter_kit.http_client import BackendResponse
from workers.adapter_kit.images.formats import convert_image, detect_content_type
from workers.adapter_kit.images.responses import (
    CONTENT_TYPES,
    GeneratedImage,
    ImageRequest,
    event_fields,
    image_event,
    is_base64,
    respond_with_images,
)
from workers.adapter_kit.multipart import FilePart, MultipartForm, encode_multipart
from workers.adapter_kit.openai.client import (
    JSON,
    OpenAIClient,
    form_fields,
    forwarded_fields,
    is_event_stream,
    parse_json_response,
    read_events,
    rejects_parameter,
)
from workers.adapter_kit.request_fields import parse_json_object
from workers.adapter_kit.sse import payloads
from workers.backends.base import Adaptation, BackendError, BackendRefused, Chunk, Finish, Output, Task

ANSWER_LIMIT = 256 * 1024 * 1024
IMAGE_LIMIT = 64 * 1024 * 1024
ABOUT_N = re.compile(r"['\"`]n['\"`]|\bn\s*(?:=|>|must|should|may)", re.IGNORECASE)
"""Messages about `n`: OpenAI's is "You must provide n=1 for this model"."""
UNSUPPORTED_PARAMETER = "unsupported_parameter"
UNSUPPORTED_HINTS = {
    "n": ("its server makes fewer images a request", "Send several requests"),
    "size": ("its server made an image of another size", "Leave size out"),
}
OPTIONAL_FIELDS = {
    "response_format": ("response_format",),
    "output_format": ("output_format", "output_compression"),
    "output_compression": ("output_format", "output_compression"),
    "stream": ("stream", "partial_images"),
}
"""Fields that an image server may refuse, and the fields that the next request leaves out."""
URL_SAFE = "/%:@!$&'()*+,;=~?"


async def generate_images(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """Yield as many images as the caller wants, in the requested format, however many the server makes at a time."""
    request = ImageRequest.from_task(task)
    drawing = _ImageGeneration(api, task, request)
    outputs = (
        drawing.stream()
        if task.stream
        else respond_with_images(task, request, drawing.images(), drawing.server_fields, keep_metadata=True)
    )
    async with aclosing(outputs):
        async for output in outputs:
            yield output


class _ImageGeneration:
    """Serves one task, by as many requests as it takes."""

    def __init__(self, api: OpenAIClient, task: Task, request: ImageRequest) -> None:
        self._api = api
        self._task = task
        self._request = request
        self._omitted_fields: set[str] = set()
        self._one_per_request = False
        """The server makes one image a request."""
        self._made_count = 0
        self._adapted: set[str] = set()
        self.server_fields: JSON = {}
        """The other fields of the server's answers; usage is added up."""

    async def images(self) -> AsyncGenerator[Adaptation | GeneratedImage]:
        """Yield as many images as the caller wants; a server that makes fewer gets further requests."""
        wanted = self._request.n
        while self._made_count < wanted:
            response = await self._request_images(1 if self._one_per_request else wanted - self._made_count)
            try:
                found = parse_json_response(response, await response.read_all(ANSWER_LIMIT))
            finally:
                response.close()
            items = self._read_items(found)
            for item in items[: wanted - self._made_count]:
                picture = await self._read_image(item)
                yield picture
                if self._has_wrong_size(await picture.size()):
                    yield self._adapt("size")
                item.clear()  # frees the memory of an image that was passed on
                self._made_count += 1
            if self._made_count < wanted:
                yield self._adapt("n")

    async def stream(self) -> AsyncGenerator[Output]:
        """Yield events as the server makes them, with corrected fields; a server without events is asked for whole images."""
        wanted = self._request.n
        if wanted > 1:
            # The number of images shows only at a stream's end, after its head has been sent.
            yield self._adapt("n")
            self._one_per_request = True
        while self._made_count < wanted:
            response = await self._request_images(1)
            try:
                outputs = self._relay_events(response) if is_event_stream(response) else self._whole_as_event(response)
                async with aclosing(outputs):
                    async for output in outputs:
                        yield output
            finally:
                response.close()
            self._made_count += 1
        media = MediaUsage(images=self._made_count, image_size=self._request.size or "")
        yield Finish(content_type="text/event-stream", media=media)

    def _adapt(self, name: str) -> Adaptation:
        """Note an adaptation. Raises BackendRefused where the policy refuses it."""
        if not self._task.adapt:
            why, instead = UNSUPPORTED_HINTS[name]
            message = f"The model '{self._task.public_model[:100]}' cannot honor '{name}': {why}. {instead}."
            raise BackendRefused(message, param=name, code=UNSUPPORTED_PARAMETER)
        self._adapted.add(name)
        return Adaptation(tuple(sorted(self._adapted)))

    def _has_wrong_size(self, size: str | None) -> bool:
        wanted = self._request.size
        return "size" not in self._adapted and None not in (wanted, size) and size != wanted

    async def _request_images(self, n: int) -> BackendResponse:
        """Request images; where the server refuses an optional field by name, repeat the request without it.

        Nexus adds `response_format` (OpenAI's newer models do not know it), an answer in one piece can serve a caller who streams,
        and any format can be converted. The refusal is not remembered: only making an image could prove that a model lacks
        the field, and a probe must cost next to nothing.
        """
        task, request = self._task, self._request
        fields = forwarded_fields(parse_json_object(task.body), task.model) | {"response_format": "b64_json"}
        fields.pop("stream", None)
        fields |= {"stream": True} if task.stream else {}
        if request.n > 1:
            fields["n"] = n
        if self._made_count and request.seed is not None:
            fields["seed"] = request.seed_for(self._made_count)
        for name in self._omitted_fields:
            fields.pop(name, None)
        path = "/images/edits" if request.edit else "/images/generations"
        while True:
            try:
                return await self._api.post(path, _request_body(fields, request))
            except BackendRefused as error:
                if fields.get("n", 1) != 1 and _is_about_n(error) and task.adapt:
                    self._one_per_request, fields["n"] = True, 1
                    continue
                named = next(
                    (name for name in OPTIONAL_FIELDS if name in fields and rejects_parameter(error, name)), None
                )
                if named is None:
                    raise
                self._omitted_fields |= set(OPTIONAL_FIELDS[named])
                for name in OPTIONAL_FIELDS[named]:
                    fields.pop(name, None)

    def _read_items(self, found: Any) -> list[JSON]:
        items = found.get("data") if isinstance(found, dict) else None
        if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
            if isinstance(found, dict) and found.get("error"):
                raise error_from_payload(found)
            raise BackendError("the backend's answer contains no images")
        rest = {name: value for name, value in found.items() if name != "data"}
        usage, more = self.server_fields.get("usage"), rest.get("usage")
        self.server_fields |= rest
        if isinstance(usage, dict) and isinstance(more, dict):
            self.server_fields["usage"] = _add_usage(usage, more)
        return items

    async def _read_image(self, item: JSON) -> GeneratedImage:
        data, coded = await _read_image(self._api, item)
        prompt = item.get("revised_prompt")
        return GeneratedImage(
            data,
            index=self._made_count,
            revised_prompt=prompt if isinstance(prompt, str) else None,
            extra_fields={
                name: value for name, value in item.items() if name not in ("b64_json", "url", "revised_prompt")
            },
            in_requested_format="output_format" not in self._omitted_fields,
            encoded=coded,
        )

    async def _whole_as_event(self, response: BackendResponse) -> AsyncGenerator[Output]:
        """Yield the image of an answer in one piece as an event."""
        items = self._read_items(parse_json_response(response, await response.read_all(ANSWER_LIMIT)))
        picture = await self._read_image(items[0])

        async def one() -> AsyncIterator[GeneratedImage]:
            yield picture

        async for output in respond_with_images(self._task, replace(self._request, n=1), one(), keep_metadata=True):
            if not isinstance(output, Finish):
                yield output

    async def _relay_events(self, response: BackendResponse) -> AsyncGenerator[Output]:
        completed = False
        async for block in read_events(response, IMAGE_LIMIT * 2):
            for payload in payloads(block):
                if payload == b"[DONE]":
                    continue
                event = parse_json_response(response, payload)
                if isinstance(event, dict) and event.get("error"):
                    raise error_from_payload(event)
                completed = completed or str(event.get("type")).endswith(".completed")
                for chunk in await self._convert_event(event):
                    yield chunk
        if not completed:
            raise BackendError("the backend's stream ended before an image was complete", transient=True)

    async def _convert_event(self, event: JSON) -> Iterable[Chunk]:
        """Return one event of the server, with fields that are true for its image."""
        name, coded = str(event.get("type") or "message"), event.pop("b64_json", None)
        if not isinstance(coded, str):
            return [Chunk(b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(event)))]
        data = base64.b64decode((await _read_image(self._api, {"b64_json": coded}))[1])
        content_type = detect_content_type(data) or "image/png"
        wanted = CONTENT_TYPES[self._request.output_format]
        if self._request.format_given and content_type != wanted:
            data = await convert_image(data, self._request.output_format, self._request.output_compression)
            content_type = wanted
        fields = await event_fields(name, data, content_type, event)
        created = event.get("created_at")
        return image_event(data, event | fields | ({"created_at": created} if isinstance(created, int) else {}))


def _is_about_n(error: BackendRefused) -> bool:
    return error.info.status in (400, 422) and (
        error.info.param == "n" or ABOUT_N.search(error.info.message) is not None
    )


def _add_usage(one: JSON, other: JSON) -> JSON:
    total = dict(one)
    for name, value in other.items():
        old = total.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            total[name] = _add_usage(old, value)
        elif isinstance(value, int) and isinstance(old, int):
            total[name] = old + value
        else:
            total[name] = value
    return total


def _request_body(fields: JSON, request: ImageRequest) -> JSON | MultipartForm:
    if not request.edit:
        return fields
    name = "image[]" if len(request.images) > 1 else "image"
    parts = [FilePart.from_file(image, name) for image in request.images]
    if request.mask is not None:
        parts.append(FilePart.from_file(request.mask))
    return encode_multipart(form_fields(fields), parts)


async def _read_image(api: OpenAIClient, item: JSON) -> tuple[bytes, bytes]:
    """Return the image's bytes where the server gave a URL, or else its base64."""
    coded, url = item.get("b64_json"), item.get("url")
    if not coded and isinstance(url, str) and not url.startswith("data:"):
        return await _download(api, url), b""
    if not isinstance(coded, str) and isinstance(url, str):
        coded = url
    try:
        data = (coded or "").encode("ascii")
    except (AttributeError, ValueError) as error:
        raise BackendError("the backend's image is not base64") from error
    if data.startswith(b"data:"):
        data = data.partition(b",")[2]
    if not is_base64(data):
        data = b"".join(data.split())  # some servers write it in lines
        if not is_base64(data):
            raise BackendError("the backend's image is not base64")
    if not data:
        raise BackendError("the backend's answer contains no image")
    return b"", data


async def _download(api: OpenAIClient, url: str) -> bytes:
    """Download an image from a URL of the backend itself. Raises BackendError for a URL of any other server."""
    client = api.http
    whole = urlsplit(urljoin(f"{client.origin}{client.prefix}/", url))
    origin = f"{whole.scheme}://{whole.netloc}"
    if origin != client.origin or not whole.path.startswith(f"{client.prefix}/"):
        raise BackendError(
            f"the backend gave its image as a URL at {origin}, and the worker fetches only URLs at {client.origin}{client.prefix};"
            " configure the backend to answer with b64_json"
        )
    path = quote(whole.path.removeprefix(client.prefix) + (f"?{whole.query}" if whole.query else ""), safe=URL_SAFE)
    response = await client.request("GET", path)
    try:
        if response.status != 200:
            raise BackendError(f"the backend answered {response.status} to the download of its own image")
        return await response.read_all(IMAGE_LIMIT)
    finally:
        response.close()
