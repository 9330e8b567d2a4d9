"""`/v1/images/generations` and `/v1/images/edits` of an OpenAI-style server."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from urllib.parse import quote, urljoin, urlsplit

from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, Output, Task
from workers.backends.images import ImageRequest, Picture, answer
from workers.backends.multipart import Encoded, FilePart, encode
from workers.backends.openai_api import JSON, Api, events_of, fields_of, form_fields, is_about, is_events, json_of
from workers.backends.refusals import stream_error
from workers.backends.requests import json_object
from workers.backends.sse import payloads
from workers.backends.wire import Response

ANSWER_LIMIT = 256 * 1024 * 1024
PICTURE_LIMIT = 64 * 1024 * 1024
HEAD = 64 * 1024
"""Bytes within which an answer says how it gives its first picture."""
TAIL = 16
"""Bytes of the end that are looked at."""
GIVEN = re.compile(rb'"(b64_json|url)"\s*:\s*"[^"]')
COMPLETED = (b'image_generation.completed"', b'image_edit.completed"')
MAGIC = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))
LEFT_OUT = {"response_format": ("response_format",), "stream": ("stream", "partial_images")}
"""What an image server may refuse, and what is left out then."""
URL_SAFE = "/%:@!$&'()*+,;=~?"


async def draw(api: Api, task: Task) -> AsyncGenerator[Output]:
    """Pictures as the server gives them where the caller wants them so; in base64 they pass by piece by piece."""
    request = ImageRequest.of(task)
    response = await _asked(api, task, request)
    try:
        if task.stream and is_events(response):
            outputs = _events(response)
        elif task.stream or request.response_format == "url":
            outputs = _made(api, task, request, response, b"")
        else:
            outputs = _relayed(api, task, request, response)
        async with aclosing(outputs):
            async for output in outputs:
                yield output
    finally:
        response.close()


async def _asked(api: Api, task: Task, request: ImageRequest) -> Response:
    """The answer; where the server refuses one of these fields by name, that of the same request without it.

    `response_format` is ours (OpenAI's newer models do not know it), and an answer in one piece serves a caller who streams as well.
    Nothing is remembered: only a picture could prove that a model lacks them, and a probe must cost next to nothing.
    """
    fields = fields_of(json_object(task.body), task.model) | {"response_format": "b64_json"}
    fields.pop("stream", None)
    fields |= {"stream": True} if task.stream else {}
    path = "/images/edits" if request.edit else "/images/generations"
    while True:
        try:
            return await api.post(path, _body(fields, request))
        except BackendRefused as error:
            named = next((name for name in LEFT_OUT if name in fields and is_about(error, name)), None)
            if named is None:
                raise
            for name in LEFT_OUT[named]:
                fields.pop(name, None)


def _body(fields: JSON, request: ImageRequest) -> JSON | Encoded:
    if not request.edit:
        return fields
    name = "image[]" if len(request.images) > 1 else "image"
    parts = [FilePart.of(image, name) for image in request.images]
    if request.mask is not None:
        parts.append(FilePart.of(request.mask))
    return encode(form_fields(fields), parts)


async def _relayed(api: Api, task: Task, request: ImageRequest, response: Response) -> AsyncGenerator[Output]:
    head = b""
    while (given := GIVEN.search(head)) is None and len(head) < HEAD and (data := await response.read()):
        head += data
    if given is None or given[1] != b"b64_json":
        async with aclosing(_made(api, task, request, response, head)) as outputs:
            async for output in outputs:
                yield output
        return
    last = head
    yield Chunk(head)
    while data := await response.read():
        last = last[-TAIL:] + data[-TAIL:]
        yield Chunk(data, 0)
    if not last.rstrip().endswith(b"}"):
        raise BackendError("the backend's answer was cut short", transient=True)
    yield Finish()


async def _events(response: Response) -> AsyncGenerator[Output]:
    completed = False
    async for block in events_of(response, PICTURE_LIMIT * 2):
        for payload in payloads(block):
            completed = completed or any(word in payload for word in COMPLETED)
            if payload.startswith(b"{") and b'"error"' in payload:
                raise stream_error(json_of(response, payload))
        events = [event for event in block.split(b"\n\n") if event and not event.startswith((b"data: [DONE]", b":"))]
        yield Chunk(b"".join(event + b"\n\n" for event in events), len(events))
    if not completed:
        raise BackendError("the backend's stream ended before a picture was complete", transient=True)
    yield Finish(content_type="text/event-stream")


def _made(api: Api, task: Task, request: ImageRequest, response: Response, head: bytes) -> AsyncGenerator[Output]:
    return answer(task, request, _pictures(api, response, head), keep_metadata=True)


async def _pictures(api: Api, response: Response, head: bytes) -> AsyncIterator[Picture]:
    found = json_of(response, head + await response.read_all(ANSWER_LIMIT))
    items = found.get("data") if isinstance(found, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        if isinstance(found, dict) and found.get("error"):
            raise stream_error(found)
        raise BackendError("the backend's answer holds no pictures")
    for index, item in enumerate(items):
        data = await _picture(api, item)
        kind = next((kind for magic, kind in MAGIC if data.startswith(magic)), "image/png")
        said = item.get("revised_prompt")
        yield Picture(data, kind, index=index, revised_prompt=said if isinstance(said, str) else None)
        item.clear()  # a picture that was passed on need not be held


async def _picture(api: Api, item: JSON) -> bytes:
    coded, url = item.get("b64_json"), item.get("url")
    if not coded and isinstance(url, str) and not url.startswith("data:"):
        return await _fetched(api, url)
    if not isinstance(coded, str) and isinstance(url, str):
        coded = url.partition(",")[2]
    try:
        data = base64.b64decode(coded or "", validate=True)
    except (ValueError, TypeError) as error:
        raise BackendError("the backend's picture is not base64") from error
    if not data:
        raise BackendError("the backend's answer holds no picture")
    return data


async def _fetched(api: Api, url: str) -> bytes:
    """What lies at a URL of the backend itself: no other server is asked, whatever the backend says."""
    client = api.client
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
