"""A protocol-true double of an HTTP service that Nexus adopts: metadata, readiness, any endpoint; faults on request."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

from tests.backends.doubles.openai import OpenAIDouble, ReceivedRequest, send_answer

CHAT = "/v1/chat/completions"
TEXT = (CHAT, "/v1/completions")


class ServiceDouble(OpenAIDouble):
    """Text as `behavior` says; what other endpoints answer is in `answers`, what it says about itself in `documents`."""

    def __init__(self, name: str = "talker", *paths: str) -> None:
        super().__init__()
        self.name = name
        self.ready = 200
        self.silent = False
        """It takes requests for what it is, and never answers."""
        self.documents: dict[str, Any] = {"/v1/metadata": self.metadata(*(paths or TEXT))}
        self.answers: dict[str, Any] = {}
        """JSON, or bytes of sound."""

    def metadata(self, *paths: str, **more: Any) -> dict[str, Any]:
        endpoints = [{"path": path, "method": "POST", "operation_id": path} for path in paths]
        return {"schema_version": "v1", "service": {"name": self.name}, "endpoints": endpoints, **more}

    async def _get(self, path: str, writer: asyncio.StreamWriter) -> bool:
        if self.silent:
            await asyncio.Event().wait()
        if path == "/readyz":
            return await send_answer(writer, self.ready, {"status": "ready" if self.ready == 200 else "loading"})
        found = self.documents.get(path)
        if found is None:
            return await send_answer(writer, 404, {"detail": "Not Found"})
        if isinstance(found, int):
            return await send_answer(writer, found, {"error": {"message": "cannot say"}}, {"location": "/elsewhere"})
        return await send_answer(writer, 200, found)

    async def _post(self, seen: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        answer = self.answers.get(seen.path)
        if answer is None or self.behavior.status != 200:
            return await super()._post(seen, reader, writer)
        return await send_answer(writer, 200, answer)

    async def _pieces(self, seen: ReceivedRequest, body: dict[str, Any]) -> AsyncIterator[bytes]:
        async for piece in super()._pieces(seen, body):
            yield piece
            if body.get("user") == "slow":
                await asyncio.Event().wait()

    @property
    def posted(self) -> list[str]:
        return [seen.path for seen in self.seen if seen.method == "POST"]


def embedding(*vectors: list[float]) -> dict[str, Any]:
    data = [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": "x", "usage": {"prompt_tokens": 2, "total_tokens": 2}}


def picture(data: bytes) -> dict[str, Any]:
    return {"created": 1, "data": [{"b64_json": base64.b64encode(data).decode()}]}


def whole_chat(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "x", "choices": choices, "usage": usage}


def form_of(seen: ReceivedRequest) -> dict[str, bytes]:
    """The parts of a multipart body, by name."""
    boundary = seen.headers["content-type"].partition("boundary=")[2].encode()
    parts = seen.body.split(b"--" + boundary)[1:-1]
    heads = [part.partition(b"\r\n\r\n") for part in parts]
    return {head.partition(b'name="')[2].partition(b'"')[0].decode(): body[:-2] for head, _, body in heads}
