"""A client of InvokeAI's HTTP API."""

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

QUEUE_PATH = "/api/v1/queue/default"
IMAGES_PATH = "/api/v1/images"
JSON_LIMIT = 64 * 1024 * 1024
IMAGE_LIMIT = 256 * 1024 * 1024


class InvokeAIClient:
    """HTTP requests to one InvokeAI server. Its methods raise BackendError."""

    def __init__(self, url: str, token: str) -> None:
        self._client = HttpClient(url, headers={"authorization": f"Bearer {token}"} if token else {})

    async def close(self) -> None:
        await self._client.close()

    async def version(self) -> None:
        """Return when the server answers."""
        await self._request_json("GET", "/api/v1/app/version")

    async def models(self) -> list[JSON]:
        """Return the records of all installed models, of any type."""
        models = (await self._request_json("GET", "/api/v2/models/")).get("models")
        if not isinstance(models, list):
            raise BackendError(
                "the backend's answer to /api/v2/models/ is not InvokeAI 6's list of models; check the worker's URL"
            )
        return models

    async def upload(self, file: UploadedFile) -> tuple[str, tuple[int, int]]:
        """Upload an image, and return its name in InvokeAI, and its width and height. InvokeAI detects the format itself."""
        kind = file.content_type if file.content_type.startswith("image/") else "image/png"
        form = encode_multipart((), [FilePart("file", file.filename, kind, file.size, file.pieces)])
        path = f"{IMAGES_PATH}/upload?image_category={'mask' if file.field == 'mask' else 'user'}&is_intermediate=true"
        response = await self._client.request(
            "POST", path, content_type=form.content_type, pieces=form.pieces(), length=form.length
        )
        if response.status == 415:
            response.close()
            raise BackendRefused(f"The file {file.field!r} is not an image that InvokeAI can read.", param=file.field)
        image = await _read_json(response)
        return str(image["image_name"]), (int(image["width"]), int(image["height"]))

    async def image(self, name: str) -> tuple[bytes, str]:
        """Return an image and its content type."""
        response = await self._client.request("GET", f"{IMAGES_PATH}/i/{quote(name, safe='')}/full")
        data = await _read(response, IMAGE_LIMIT)
        return data, response.headers.get("content-type", "image/png")

    async def delete_images(self, names: Sequence[str]) -> None:
        """Delete images."""
        if names:
            await self._request_json("POST", f"{IMAGES_PATH}/delete", {"image_names": list(names)})

    async def enqueue(self, batch: JSON, wanted: int) -> list[int]:
        """Queue a batch, and return the ids of its items, in the order of its seeds."""
        answer = await self._request_json("POST", f"{QUEUE_PATH}/enqueue_batch", batch)
        items = sorted(int(item) for item in answer["item_ids"])
        if len(items) < wanted:
            for item in items:
                await self.cancel(item)
            raise BackendUnavailable("InvokeAI's queue is full.")
        return items

    async def item(self, item: int) -> JSON:
        """Return a queue item, with the session that holds its results."""
        return await self._request_json("GET", f"{QUEUE_PATH}/i/{item}")

    async def cancel(self, item: int) -> JSON:
        """Cancel a queue item, and return it. An item that has ended does not change."""
        return await self._request_json("PUT", f"{QUEUE_PATH}/i/{item}/cancel")

    async def is_winding_down(self) -> bool:
        """Return whether InvokeAI still works on a canceled item, which runs on to the end of its step."""
        status = await self._request_json("GET", f"{QUEUE_PATH}/status")
        return bool(status["processor"]["is_processing"]) and not status["queue"]["in_progress"]

    async def _request_json(self, method: str, path: str, body: JSON | None = None) -> JSON:
        data = None if body is None else orjson.dumps(body)
        return await _read_json(await self._client.request(method, path, data))


async def _read_json(response: BackendResponse) -> JSON:
    data = await _read(response, JSON_LIMIT)
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BackendError("InvokeAI's answer is not JSON; check the worker's URL") from error
    if not isinstance(value, dict):
        raise BackendError("InvokeAI's answer is not a JSON object")
    return value


async def _read(response: BackendResponse, limit: int) -> bytes:
    try:
        data = await response.read_all(limit)
    finally:
        response.close()
    if response.status >= 300:
        raise error_from_response(response.status, response.headers, data)
    return data
