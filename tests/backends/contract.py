"""What every text adapter must do, as tests. A module runs them on its adapter by a subclass and a fixture `rig`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest

from schemas.jobs import Capability
from tests.backends.described import check_description
from workers.backends.base import (
    Backend,
    BackendRefused,
    Chunk,
    Finish,
    ModelNotServed,
    Output,
    Task,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = dict[str, Any]


@dataclass
class Rig:
    """An adapter, and what the tests must know about the server behind it."""

    backend: Backend
    model: str
    idle: Callable[[], Awaitable[bool]]
    """Whether the server works on nothing."""
    long: JSON
    """What makes an answer take many seconds."""
    deterministic: bool = True
    context_length: int | None = None


def chat(model: str, stream: bool = False, public_model: str | None = None, **fields: Any) -> Task:
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello to the world"}], "temperature": 0}
    return task(CHAT, model, stream, body | fields, public_model)


def completion(model: str, stream: bool = False, public_model: str | None = None, **fields: Any) -> Task:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    return task(COMPLETIONS, model, stream, body | fields, public_model)


def task(endpoint: str, model: str, stream: bool, body: JSON | bytes, public_model: str | None = None) -> Task:
    data = body if isinstance(body, bytes) else json.dumps(body | ({"stream": True} if stream else {})).encode()
    capability = Capability.CHAT if endpoint == CHAT else Capability.COMPLETIONS
    return Task("job_1", "req_1", capability, endpoint, model, public_model or model, stream, data)


async def collect(backend: Backend, work: Task) -> tuple[list[Chunk], Finish]:
    """All output; exactly one Finish, last."""
    outputs = [output async for output in backend.run(work)]
    assert isinstance(outputs[-1], Finish)
    chunks = outputs[:-1]
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    return cast("list[Chunk]", chunks), outputs[-1]


def events(chunks: list[Chunk]) -> list[JSON]:
    """The events of a stream; each frame is exactly one data line and an empty one, and no Chunk cuts a frame."""
    assert all(chunk.data.endswith(b"\n\n") for chunk in chunks)
    frames = b"".join(chunk.data for chunk in chunks).split(b"\n\n")[:-1]
    assert all(frame.startswith(b"data: {") and b"\n" not in frame and b"\r" not in frame for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


def check_stream(found: list[JSON], model: str, *, is_chat: bool, include_usage: bool = False) -> str:
    """All that clients rely on in a stream. Returns its text."""
    for name in ("id", "created", "model", "object"):
        assert len({event[name] for event in found}) == 1, name
    assert found[0]["model"] == model
    assert isinstance(found[0]["created"], int)
    if include_usage:
        *found, last = found
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
        assert all(event["usage"] is None for event in found)
    else:
        assert not any(event.get("usage") for event in found)
    choices = [choice for event in found for choice in event["choices"]]
    assert all(event["choices"] for event in found)
    for index in {choice["index"] for choice in choices}:
        own = [choice for choice in choices if choice["index"] == index]
        assert [bool(choice["finish_reason"]) for choice in own] == [False] * (len(own) - 1) + [True]
        if is_chat:
            assert own[0]["delta"]["role"] == "assistant"
    if is_chat:
        return "".join(choice["delta"].get("content") or "" for choice in choices)
    return "".join(choice["text"] for choice in choices)


async def body_of(backend: Backend, work: Task) -> tuple[JSON, Finish]:
    chunks, finish = await collect(backend, work)
    assert finish.content_type == "application/json"
    return json.loads(b"".join(chunk.data for chunk in chunks)), finish


async def until_idle(rig: Rig, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not await rig.idle():
            await asyncio.sleep(0.02)


class Contract:
    """See the module's docstring."""

    async def test_says_what_it_serves(self, rig: Rig) -> None:
        found = await rig.backend.discover()
        offer = next(model for model in found.models if model.name == rig.model)
        assert {Capability.CHAT, Capability.COMPLETIONS} <= set(offer.capabilities)
        assert offer.context_length == rig.context_length
        assert found.slots is None or found.slots > 0

    async def test_says_what_its_models_can_be_told(self, rig: Rig) -> None:
        described = await check_description(rig.backend, rig.model)
        assert {CHAT, COMPLETIONS} <= set(described.endpoints)

    async def test_is_healthy(self, rig: Rig) -> None:
        await rig.backend.health()

    async def test_chat_stream(self, rig: Rig) -> None:
        chunks, finish = await collect(rig.backend, chat(rig.model, stream=True, public_model="alias", max_tokens=12))
        text = check_stream(events(chunks), "alias", is_chat=True)
        assert text
        assert finish.usage is not None
        assert finish.usage.completion_tokens > 0
        assert sum(chunk.tokens for chunk in chunks) > 0

    async def test_chat_stream_with_usage(self, rig: Rig) -> None:
        work = chat(rig.model, stream=True, max_tokens=6, stream_options={"include_usage": True})
        chunks, finish = await collect(rig.backend, work)
        found = events(chunks)
        check_stream(found, rig.model, is_chat=True, include_usage=True)
        assert finish.usage is not None
        assert found[-1]["usage"]["completion_tokens"] == finish.usage.completion_tokens

    async def test_chat_in_one_piece(self, rig: Rig) -> None:
        body, finish = await body_of(rig.backend, chat(rig.model, public_model="alias", max_tokens=12))
        assert body["object"] == "chat.completion"
        assert body["model"] == "alias"
        assert isinstance(body["created"], int)
        [choice] = body["choices"]
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["refusal"] is None
        assert choice["logprobs"] is None
        assert choice["finish_reason"] in ("stop", "length")
        assert finish.usage is not None
        assert body["usage"]["total_tokens"] == finish.usage.total_tokens > 0

    async def test_one_piece_is_the_stream_joined(self, rig: Rig) -> None:
        body, _ = await body_of(rig.backend, chat(rig.model, max_tokens=12))
        chunks, _ = await collect(rig.backend, chat(rig.model, stream=True, max_tokens=12))
        found = events(chunks)
        text = check_stream(found, rig.model, is_chat=True)
        assert set(found[-1]) - {"timings"} <= set(body)
        if rig.deterministic:
            assert body["choices"][0]["message"]["content"] == text

    async def test_completion_stream(self, rig: Rig) -> None:
        chunks, finish = await collect(rig.backend, completion(rig.model, stream=True, public_model="alias"))
        assert check_stream(events(chunks), "alias", is_chat=False)
        assert finish.usage is not None

    async def test_completion_in_one_piece(self, rig: Rig) -> None:
        body, _ = await body_of(rig.backend, completion(rig.model))
        assert body["object"] == "text_completion"
        [choice] = body["choices"]
        assert choice["text"]
        assert choice["finish_reason"] in ("stop", "length")
        assert "delta" not in choice
        assert "message" not in choice

    async def test_an_unknown_model_is_not_found(self, rig: Rig) -> None:
        with pytest.raises(ModelNotServed) as caught:
            await collect(rig.backend, chat("no-such-model"))
        assert (caught.value.info.status, caught.value.info.code) == (404, "model_not_found")

    async def test_bad_input_is_refused(self, rig: Rig) -> None:
        with pytest.raises(BackendRefused) as caught:
            await collect(rig.backend, chat(rig.model, messages="not a list"))
        assert caught.value.info.status == 400
        assert caught.value.info.type == "invalid_request_error"
        assert not caught.value.transient

    async def test_a_body_that_is_no_json_is_refused(self, rig: Rig) -> None:
        with pytest.raises(BackendRefused):
            await collect(rig.backend, task(CHAT, rig.model, False, b"{nonsense"))

    @pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
    async def test_closing_stops_the_server(self, rig: Rig, stream: bool) -> None:
        output = cast("AsyncGenerator[Output, None]", rig.backend.run(chat(rig.model, stream=stream, **rig.long)))
        await anext(output)
        assert not await rig.idle()
        await output.aclose()
        await until_idle(rig)

    @pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
    async def test_cancelling_stops_the_server(self, rig: Rig, stream: bool) -> None:
        async def consume() -> None:
            async for _ in rig.backend.run(chat(rig.model, stream=stream, **rig.long)):
                begun.set()

        begun = asyncio.Event()
        running = asyncio.create_task(consume())
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await until_idle(rig)

    async def test_many_at_once_do_not_mix(self, rig: Rig) -> None:
        works = [chat(rig.model, stream=True, public_model=f"m{number}", max_tokens=5) for number in range(8)]
        answers = await asyncio.gather(*(collect(rig.backend, work) for work in works))
        for number, (chunks, _) in enumerate(answers):
            check_stream(events(chunks), f"m{number}", is_chat=True)
