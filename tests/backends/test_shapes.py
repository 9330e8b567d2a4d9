"""Every recorded shape, through every adapter that speaks its wire, however it arrives: callers get what OpenAI sends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from schemas.jobs import Capability
from schemas.presence import ServiceRecord
from tests.backends.compatibility import PAGE, page
from tests.backends.contract import collect, events
from tests.backends.shape_corpus import (
    CUTS,
    MODEL,
    PATHS,
    Shape,
    ShapeServer,
    check_error,
    check_stream,
    check_whole,
    shapes,
)
from workers.backends.base import Backend, BackendConfig, BackendError, Task, make_backend

SPEAKERS = {"openai": ("openai", "service"), "ollama": ("ollama",)}
RUNS = [(shape, adapter) for shape in shapes() for adapter in SPEAKERS[shape.adapter]]


@pytest.fixture
async def server() -> AsyncIterator[ShapeServer]:
    async with ShapeServer() as running:
        yield running


@asynccontextmanager
async def backend_of(kind: str, url: str) -> AsyncIterator[Backend]:
    backend = make_backend(kind, BackendConfig(url="" if kind == "service" else url))
    if kind == "service":
        backend.services_changed({"shapes": ServiceRecord(name="shapes", base_url=url)})
    await backend.start()
    try:
        await backend.discover()
        yield backend
    finally:
        await backend.close()


def task_of(shape: Shape, stream: bool) -> Task:
    body: dict[str, Any] = {"model": MODEL, **shape.request}
    body |= {"messages": [{"role": "user", "content": "hello"}]} if shape.endpoint == "chat" else {"prompt": "hello"}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    capability = Capability.CHAT if shape.endpoint == "chat" else Capability.COMPLETIONS
    model = f"{MODEL}:latest" if shape.adapter == "ollama" else MODEL
    return Task("job_1", "req_1", capability, PATHS[shape.endpoint], model, "alias", stream, json.dumps(body).encode())


async def check(backend: Backend, shape: Shape, stream: bool) -> None:
    work = task_of(shape, stream)
    if "error" in shape.want:
        with pytest.raises(BackendError) as caught:
            await collect(backend, work)
        check_error(caught.value.info, shape.want["error"])
        return
    chunks, _ = await collect(backend, work)
    if stream:
        found = events(chunks)
        for event in found:
            if shape.endpoint == "chat":  # of a completion, OpenAI's types know the whole alone
                ChatCompletionChunk.model_validate(event)
        check_stream(found, shape, "alias")
    else:
        body = json.loads(b"".join(chunk.data for chunk in chunks))
        (ChatCompletion if shape.endpoint == "chat" else Completion).model_validate(body)
        check_whole(body, shape, "alias")


@pytest.mark.parametrize(("shape", "adapter"), RUNS, ids=[f"{shape.id}-{adapter}" for shape, adapter in RUNS])
async def test_callers_get_what_openai_sends(server: ShapeServer, shape: Shape, adapter: str) -> None:
    """Streamed and in one piece, whether the bytes arrive at once, by events, one by one, or cut within characters."""
    server.shape = shape
    runs = list(product(CUTS if adapter != "service" else ("whole", "events"), (False, True)))
    # A backend of its own for each, where an error may make it pause.
    for group in [[run] for run in runs] if "error" in shape.want else [runs]:
        async with backend_of(adapter, server.url) as backend:
            for server.how, stream in group:
                try:
                    await check(backend, shape, stream)
                except Exception as error:
                    error.add_note(f"{server.how=} {stream=}")
                    raise


def test_the_page_lists_every_shape() -> None:
    """`python -m tests.backends.compatibility` writes it again."""
    assert PAGE.read_text() == page()


def test_every_shape_says_where_it_comes_from() -> None:
    """A public report or a document; else it is one of any server, or of one whose form allows it."""
    for shape in shapes():
        assert all(url.startswith("https://") for url in shape.entry["seen"]), shape.id
        assert shape.entry["quirk"], shape.id
