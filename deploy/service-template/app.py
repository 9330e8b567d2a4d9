"""A service for Nexus: text in, text out, by a model of your own. Copy this folder, and replace `Model`.

Nexus asks `/readyz` and `/v1/metadata`, offers what they say under the names in `models`, and passes requests on. The
rest of the contract is in Nexus's docs/reference/service-api.md. Settings are environment variables: `SERVICE_NAME`,
`MODEL_NAME`, `CONCURRENCY`.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

SERVICE = os.environ.get("SERVICE_NAME", "upside-down")
MODEL = os.environ.get("MODEL_NAME", SERVICE)
CONCURRENCY = int(os.environ.get("CONCURRENCY", "4"))
VERSION = "1.0.0"


# Your model


class Model:
    """Yours goes here. This one says every word backwards."""

    ready = False

    async def load(self) -> None:
        """Load the weights and open the connections that the first request needs. `/readyz` answers 503 until then."""
        self.ready = True

    async def words(self, messages: list[Message]) -> AsyncGenerator[str]:
        """Yield the answer, piece by piece. The generator is closed when the caller disconnects: stop the work then.

        Work that keeps a processor busy belongs into a thread: `await asyncio.to_thread(…)`.
        """
        text = messages[-1].text()
        if not text.strip():
            raise Refused("there is nothing to say backwards", param="messages")
        for word in text.split():
            yield word[::-1] + " "
            await asyncio.sleep(0.01)


class Refused(Exception):
    """The request is wrong: 400, and it is not tried again."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


# What a request looks like


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return " ".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""


class ChatRequest(BaseModel):
    """OpenAI's. Fields that are not known are let through."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: dict[str, Any] | None = None


# The four routes that say how the service is and what it does

model = Model()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    loading = asyncio.create_task(model.load())  # the service answers `/health` meanwhile
    yield
    loading.cancel()


app = FastAPI(title=SERVICE, version=VERSION, lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    """Answer that the process runs."""
    return {"status": "ok"}


@app.get("/readyz")
async def readyz() -> JSONResponse:
    """Say whether the service takes requests. Nexus sends none while the status is not 200."""
    status = "ready" if model.ready else "loading"
    return JSONResponse({"status": status}, status_code=200 if model.ready else 503)


@app.get("/v1/metadata")
async def metadata() -> dict[str, Any]:
    """Describe what the service serves."""
    return {
        "schema_version": "v1",
        "service": {"name": SERVICE, "version": VERSION, "description": "Says every word backwards."},
        "endpoints": [{"path": "/v1/chat/completions", "method": "POST", "operation_id": "chat.completions.create"}],
        "models": [{"id": MODEL, "capabilities": ["chat"]}],
        "capabilities": {
            "domains": ["chat"],
            "modalities": ["text"],
            "streaming": True,
            "max_concurrency": CONCURRENCY,
        },
    }


@app.get("/v1/descriptor")
async def descriptor() -> dict[str, Any]:
    """Return the metadata with hints for user interfaces. Nexus reads it where the metadata lacks something."""
    types = {"default": "application/json", "streaming": "text/event-stream"}
    return await metadata() | {"response_types": types, "ui": {"options": []}}


# The endpoint


@app.post("/v1/chat/completions", response_model=None)
async def chat(request: ChatRequest) -> Response | dict[str, Any]:
    if request.model != MODEL:
        raise NotServed(request.model)
    words = model.words(request.messages)
    first = await anext(words, "")  # an error before the first word is an HTTP status, never a 200
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
    if request.stream:
        return StreamingResponse(events(head, request, first, words), media_type="text/event-stream")
    text = first + "".join([word async for word in words])
    message = {"role": "assistant", "content": text.strip()}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return head | {"object": "chat.completion", "choices": [choice], "usage": usage(request, text)}


async def events(
    head: dict[str, Any], request: ChatRequest, first: str, words: AsyncGenerator[str]
) -> AsyncIterator[str]:
    """Chunks, one with `finish_reason`, the usage where it is wanted, `[DONE]`. Otherwise it counts as broken off."""
    head = head | {"object": "chat.completion.chunk"}
    told = first

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

    try:
        async with aclosing(words):  # also when the caller hangs up
            yield event({"role": "assistant", "content": first})
            async for word in words:
                told += word
                yield event({"content": word})
    except Exception as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error', 'code': None}})}\n\n"
        return  # without [DONE]: this was no good end
    yield event({}, "stop")
    if (request.stream_options or {}).get("include_usage"):
        yield f"data: {json.dumps(head | {'choices': [], 'usage': usage(request, told)})}\n\n"
    yield "data: [DONE]\n\n"


def usage(request: ChatRequest, text: str) -> dict[str, int]:
    """Tokens; here, words."""
    prompt, completion = sum(len(one.text().split()) for one in request.messages), len(text.split())
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


# Errors, as OpenAI's clients read them


class NotServed(Exception):
    """Another model than this service has."""


def error(status: int, message: str, kind: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status_code=status)


@app.exception_handler(NotServed)
async def not_served(_: Request, problem: NotServed) -> JSONResponse:
    return error(404, f"there is no model {problem}", "invalid_request_error", "model", "model_not_found")


@app.exception_handler(Refused)
async def refused(_: Request, problem: Refused) -> JSONResponse:
    return error(400, str(problem), "invalid_request_error", problem.param)


@app.exception_handler(RequestValidationError)
async def invalid(_: Request, problem: RequestValidationError) -> JSONResponse:
    first = problem.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    return error(400, f"{field}: {first['msg']}", "invalid_request_error", field or None)


@app.exception_handler(Exception)
async def failed(_: Request, problem: Exception) -> JSONResponse:
    return error(500, f"{type(problem).__name__}: {problem}", "server_error")
