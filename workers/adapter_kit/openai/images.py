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

from workers.adapter_kit.error_mapping import error_from_payload
from workers.adapter_kit.http_client import BackendResponse
from workers.adapter_kit.images.formats import convert_image, detect_content_type
from workers.adapter_kit.images.responses import (
    CONTENT_TYPES,
    GeneratedImage,
    ImageRequest,
    event_fields,
    format_size,
    image_event,
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
PICTURE_LIMIT = 64 * 1024 * 1024
ABOUT_N = re.compile(r"['\"`]n['\"`]|\bn\s*(?:=|>|must|should|may)", re.IGNORECASE)
"""Words of a refusal that is about `n`: OpenAI's are "You must provide n=1 for this model"."""
CODE = "unsupported_parameter"
REFUSED = {
    "n": ("its server makes fewer pictures a request", "Send several requests"),
    "size": ("its server made a picture of another size", "Leave size out"),
}
LEFT_OUT = {
    "response_format": ("response_format",),
    "output_format": ("output_format", "output_compression"),
    "output_compression": ("output_format", "output_compression"),
    "stream": ("stream", "partial_images"),
}
"""What an image server may refuse, and what is left out then."""
URL_SAFE = "/%:@!$&'()*+,;=~?"


async def generate_images(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """Pictures in the format and the number that the caller wants, however many the server makes at a time."""
    request = ImageRequest.from_task(task)
    drawing = _ImageGeneration(api, task, request)
    outputs = (
        drawing.stream()
        if task.stream
        else respond_with_images(task, request, drawing.pictures(), drawing.said, keep_metadata=True)
    )
    async with aclosing(outputs):
        async for output in outputs:
            yield output


class _ImageGeneration:
    """One task, and the requests that it takes."""

    def __init__(self, api: OpenAIClient, task: Task, request: ImageRequest) -> None:
        self._api = api
        self._task = task
        self._request = request
        self._left_out: set[str] = set()
        self._alone = False
        """The server makes one picture a request."""
        self._made = 0
        self._adapted: set[str] = set()
        self.said: JSON = {}
        """What the answers say beside their pictures; usage added up."""

    async def pictures(self) -> AsyncGenerator[Adaptation | GeneratedImage]:
        """As many as the caller wants: a server that gives fewer is asked for the rest."""
        wanted = self._request.n
        while self._made < wanted:
            response = await self._asked(1 if self._alone else wanted - self._made)
            try:
                found = parse_json_response(response, await response.read_all(ANSWER_LIMIT))
            finally:
                response.close()
            items = self._items(found)
            for item in items[: wanted - self._made]:
                picture = await self._picture(item)
                yield picture
                if self._wrong_size(await format_size(picture.data)):
                    yield self._adapt("size")
                item.clear()  # a picture that was passed on need not be held
                self._made += 1
            if self._made < wanted:
                yield self._adapt("n")

    async def stream(self) -> AsyncGenerator[Output]:
        """Events as the server makes them, with true fields; a server without events is asked for pictures."""
        wanted = self._request.n
        if wanted > 1:
            # How many a stream holds shows at its end, and by then its head has left.
            yield self._adapt("n")
            self._alone = True
        while self._made < wanted:
            response = await self._asked(1)
            try:
                outputs = self._events(response) if is_event_stream(response) else self._as_events(response)
                async with aclosing(outputs):
                    async for output in outputs:
                        yield output
            finally:
                response.close()
            self._made += 1
        yield Finish(content_type="text/event-stream")

    def _adapt(self, name: str) -> Adaptation:
        """Raises BackendRefused where the policy does."""
        if not self._task.adapt:
            why, instead = REFUSED[name]
            message = f"The model '{self._task.public_model[:100]}' cannot honor '{name}': {why}. {instead}."
            raise BackendRefused(message, param=name, code=CODE)
        self._adapted.add(name)
        return Adaptation(tuple(sorted(self._adapted)))

    def _wrong_size(self, size: str | None) -> bool:
        wanted = self._request.size
        return "size" not in self._adapted and None not in (wanted, size) and size != wanted

    async def _asked(self, n: int) -> BackendResponse:
        """The answer; where the server refuses one of these fields by name, that of the same request without it.

        `response_format` is ours (OpenAI's newer models do not know it), an answer in one piece serves a caller who streams as
        well, and any format can be made here. Nothing is remembered: only a picture could prove that a model lacks them, and a
        probe must cost next to nothing.
        """
        task, request = self._task, self._request
        fields = forwarded_fields(parse_json_object(task.body), task.model) | {"response_format": "b64_json"}
        fields.pop("stream", None)
        fields |= {"stream": True} if task.stream else {}
        if request.n > 1:
            fields["n"] = n
        if self._made and request.seed is not None:
            fields["seed"] = request.seed_for(self._made)
        for name in self._left_out:
            fields.pop(name, None)
        path = "/images/edits" if request.edit else "/images/generations"
        while True:
            try:
                return await self._api.post(path, _body(fields, request))
            except BackendRefused as error:
                if fields.get("n", 1) != 1 and _is_about_n(error) and task.adapt:
                    self._alone, fields["n"] = True, 1
                    continue
                named = next((name for name in LEFT_OUT if name in fields and rejects_parameter(error, name)), None)
                if named is None:
                    raise
                self._left_out |= set(LEFT_OUT[named])
                for name in LEFT_OUT[named]:
                    fields.pop(name, None)

    def _items(self, found: Any) -> list[JSON]:
        items = found.get("data") if isinstance(found, dict) else None
        if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
            if isinstance(found, dict) and found.get("error"):
                raise error_from_payload(found)
            raise BackendError("the backend's answer holds no pictures")
        rest = {name: value for name, value in found.items() if name != "data"}
        usage, more = self.said.get("usage"), rest.get("usage")
        self.said |= rest
        if isinstance(usage, dict) and isinstance(more, dict):
            self.said["usage"] = _sum(usage, more)
        return items

    async def _picture(self, item: JSON) -> GeneratedImage:
        data = await _picture(self._api, item)
        prompt = item.get("revised_prompt")
        return GeneratedImage(
            data,
            index=self._made,
            revised_prompt=prompt if isinstance(prompt, str) else None,
            extra_fields={
                name: value for name, value in item.items() if name not in ("b64_json", "url", "revised_prompt")
            },
            in_requested_format="output_format" not in self._left_out,
        )

    async def _as_events(self, response: BackendResponse) -> AsyncGenerator[Output]:
        """The finished picture of an answer that is no stream."""
        items = self._items(parse_json_response(response, await response.read_all(ANSWER_LIMIT)))
        picture = await self._picture(items[0])

        async def one() -> AsyncIterator[GeneratedImage]:
            yield picture

        async for output in respond_with_images(self._task, replace(self._request, n=1), one(), keep_metadata=True):
            if not isinstance(output, Finish):
                yield output

    async def _events(self, response: BackendResponse) -> AsyncGenerator[Output]:
        completed = False
        async for block in read_events(response, PICTURE_LIMIT * 2):
            for payload in payloads(block):
                if payload == b"[DONE]":
                    continue
                event = parse_json_response(response, payload)
                if isinstance(event, dict) and event.get("error"):
                    raise error_from_payload(event)
                completed = completed or str(event.get("type")).endswith(".completed")
                for chunk in await self._event(event):
                    yield chunk
        if not completed:
            raise BackendError("the backend's stream ended before a picture was complete", transient=True)

    async def _event(self, event: JSON) -> Iterable[Chunk]:
        """One event of the server's, with fields that are true of its picture."""
        name, coded = str(event.get("type") or "message"), event.pop("b64_json", None)
        if not isinstance(coded, str):
            return [Chunk(b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(event)))]
        data = await _picture(self._api, {"b64_json": coded})
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


def _sum(one: JSON, other: JSON) -> JSON:
    total = dict(one)
    for name, value in other.items():
        old = total.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            total[name] = _sum(old, value)
        elif isinstance(value, int) and isinstance(old, int):
            total[name] = old + value
        else:
            total[name] = value
    return total


def _body(fields: JSON, request: ImageRequest) -> JSON | MultipartForm:
    if not request.edit:
        return fields
    name = "image[]" if len(request.images) > 1 else "image"
    parts = [FilePart.from_file(image, name) for image in request.images]
    if request.mask is not None:
        parts.append(FilePart.from_file(request.mask))
    return encode_multipart(form_fields(fields), parts)


async def _picture(api: OpenAIClient, item: JSON) -> bytes:
    coded, url = item.get("b64_json"), item.get("url")
    if not coded and isinstance(url, str) and not url.startswith("data:"):
        return await _fetched(api, url)
    if not isinstance(coded, str) and isinstance(url, str):
        coded = url
    try:
        data = base64.b64decode(_bare(coded or ""), validate=True)
    except (AttributeError, ValueError) as error:
        raise BackendError("the backend's picture is not base64") from error
    if not data:
        raise BackendError("the backend's answer holds no picture")
    return data


def _bare(coded: str) -> str:
    """The base64 alone, which some servers write as a data URL, or in lines."""
    return "".join((coded.partition(",")[2] if coded.startswith("data:") else coded).split())


async def _fetched(api: OpenAIClient, url: str) -> bytes:
    """What lies at a URL of the backend itself: no other server is asked, whatever the backend says."""
    client = api.http
    whole = urlsplit(urljoin(f"{client.origin}{client.prefix}/", url))
    origin = f"{whole.scheme}://{whole.netloc}"
    if origin != client.origin or not whole.path.startswith(f"{client.prefix}/"):
        raise BackendError(
            f"the backend gave its picture as a URL at {origin}, and only {client.origin}{client.prefix} is asked for any;"
            " set it up to answer with b64_json"
        )
    path = quote(whole.path.removeprefix(client.prefix) + (f"?{whole.query}" if whole.query else ""), safe=URL_SAFE)
    response = await client.request("GET", path)
    try:
        if response.status != 200:
            raise BackendError(f"the backend answered {response.status} for the picture that it had made")
        return await response.read_all(PICTURE_LIMIT)
    finally:
        response.close()
