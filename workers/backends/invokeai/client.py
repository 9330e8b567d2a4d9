"""InvokeAI's HTTP API, as far as the adapter needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import orjson

from workers.adapter_kit.error_mapping import error_from_response
from workers.adapter_kit.http_client import BackendResponse, HttpClient
from workers.adapter_kit.multipart import FilePart, encode_multipart
from workers.backends.base import BackendError, BackendRefused, BackendUnavailable, UploadedFile

JSON = dict[str, Any]

QUEUE = "/api/v1/queue/default"
IMAGES = "/api/v1/images"
JSON_LIMIT = 64 * 1024 * 1024
PICTURE_LIMIT = 256 * 1024 * 1024


class InvokeAIClient:
    """One server. Raises BackendError for whatever it refuses or fails at."""

    def __init__(self, url: str, token: str) -> None:
        self._client = HttpClient(url, headers={"authorization": f"Bearer {token}"} if token else {})

    async def close(self) -> None:
        await self._client.close()

    async def version(self) -> None:
        """Return when the server answers."""
        await self._json("GET", "/api/v1/app/version")

    async def models(self) -> list[JSON]:
        """Every installed model, of whatever type."""
        models = (await self._json("GET", "/api/v2/models/")).get("models")
        if not isinstance(models, list):
            raise BackendError("InvokeAI's list of models is none; is this an InvokeAI 6 server?")
        return models

    async def upload(self, file: UploadedFile) -> tuple[str, tuple[int, int]]:
        """The picture's name there, and its width and height. InvokeAI reads PNG, JPEG, WebP and more, whatever the type says."""
        kind = file.content_type if file.content_type.startswith("image/") else "image/png"
        form = encode_multipart((), [FilePart("file", file.filename, kind, file.size, file.pieces)])
        path = f"{IMAGES}/upload?image_category={'mask' if file.field == 'mask' else 'user'}&is_intermediate=true"
        response = await self._client.request(
            "POST", path, content_type=form.content_type, pieces=form.pieces(), length=form.length
        )
        if response.status == 415:
            response.close()
            raise BackendRefused(f"{file.field} is not a picture that InvokeAI can read", param=file.field)
        picture = await _read_json(response)
        return str(picture["image_name"]), (int(picture["width"]), int(picture["height"]))

    async def picture(self, name: str) -> tuple[bytes, str]:
        """A picture and its content type."""
        response = await self._client.request("GET", f"{IMAGES}/i/{quote(name, safe='')}/full")
        data = await _read(response, PICTURE_LIMIT)
        return data, response.headers.get("content-type", "image/png")

    async def discard(self, names: Sequence[str]) -> None:
        """Delete pictures."""
        if names:
            await self._json("POST", f"{IMAGES}/delete", {"image_names": list(names)})

    async def enqueue(self, batch: JSON, wanted: int) -> list[int]:
        """The ids of the batch's items, in the order of its seeds."""
        answer = await self._json("POST", f"{QUEUE}/enqueue_batch", batch)
        items = sorted(int(item) for item in answer["item_ids"])
        if len(items) < wanted:
            for item in items:
                await self.cancel(item)
            raise BackendUnavailable("InvokeAI's queue is full")
        return items

    async def item(self, item: int) -> JSON:
        """A queue item, with the session that holds its results."""
        return await self._json("GET", f"{QUEUE}/i/{item}")

    async def cancel(self, item: int) -> JSON:
        """The item afterwards. One that has ended stays as it is."""
        return await self._json("PUT", f"{QUEUE}/i/{item}/cancel")

    async def winding_down(self) -> bool:
        """Whether it works on something that counts as ended: a cancelled item runs on to the end of its step."""
        status = await self._json("GET", f"{QUEUE}/status")
        return bool(status["processor"]["is_processing"]) and not status["queue"]["in_progress"]

    async def _json(self, method: str, path: str, body: JSON | None = None) -> JSON:
        data = None if body is None else orjson.dumps(body)
        return await _read_json(await self._client.request(method, path, data))


async def _read_json(response: BackendResponse) -> JSON:
    data = await _read(response, JSON_LIMIT)
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BackendError("InvokeAI answered with something that is not JSON") from error
    if not isinstance(value, dict):
        raise BackendError("InvokeAI answered with something else than an object")
    return value


async def _read(response: BackendResponse, limit: int) -> bytes:
    try:
        data = await response.read_all(limit)
    finally:
        response.close()
    if response.status >= 300:
        raise error_from_response(response.status, response.headers, data)
    return data
