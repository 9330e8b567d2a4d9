"""The adapter for OpenAI-compatible servers, on a real llama.cpp server with real weights."""

from __future__ import annotations

import asyncio
import json
import signal
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.backends.contract import (
    Contract,
    Rig,
    body_of,
    chat,
    check_stream,
    collect,
    completion,
    events,
)
from tests.backends.llama_server import LlamaServer
from workers.adapter_kit.http_client import HttpClient
from workers.adapter_kit.openai.client import OpenAIClient
from workers.adapter_kit.openai.feature_probes import STREAM, STREAM_OPTIONS, TOOL_STREAM, lacks_text_feature
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
)
from workers.backends.openai import OpenAIBackend

MODEL = "smollm2"


@pytest.fixture
async def backend(llama: LlamaServer) -> AsyncIterator[Backend]:
    made = OpenAIBackend(BackendConfig(url=llama.url))
    yield made
    await made.close()


async def busy_slots(llama: LlamaServer) -> int:
    def ask() -> Any:
        with urllib.request.urlopen(f"{llama.url}/slots", timeout=5) as answer:
            return json.load(answer)

    return sum(slot["is_processing"] for slot in await asyncio.to_thread(ask))


class TestLlamaCpp(Contract):
    @pytest.fixture
    async def rig(self, llama: LlamaServer, backend: Backend) -> Rig:
        async def idle() -> bool:
            return await busy_slots(llama) == 0

        long = {"max_tokens": 1900, "ignore_eos": True}
        return Rig(backend, MODEL, idle, long, deterministic=False, context_length=2048)


async def test_slots_are_known(backend: Backend) -> None:
    assert (await backend.discover()).slots == 2


async def test_n_is_honoured_and_its_usage_added(backend: Backend) -> None:
    body, finish = await body_of(backend, chat(MODEL, n=2, max_tokens=4, ignore_eos=True))
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert finish.usage is not None
    assert finish.usage.completion_tokens == 8
    chunks, _ = await collect(backend, chat(MODEL, stream=True, n=2, max_tokens=4))
    check_stream(events(chunks), MODEL, is_chat=True)


async def test_a_list_of_prompts_is_answered(backend: Backend) -> None:
    body, _ = await body_of(backend, completion(MODEL, prompt=["One", "Two"]))
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    chunks, _ = await collect(backend, completion(MODEL, stream=True, prompt=["One", "Two"]))
    check_stream(events(chunks), MODEL, is_chat=False)


async def test_log_probabilities_are_joined(backend: Backend) -> None:
    body, _ = await body_of(backend, chat(MODEL, logprobs=True, top_logprobs=2, max_tokens=5))
    choice = body["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(part["token"] for part in content) == choice["message"]["content"]
    assert all(len(part["top_logprobs"]) == 2 for part in content)


async def test_a_response_format_is_kept_to(backend: Backend) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body, _ = await body_of(backend, chat(MODEL, response_format=wanted, max_tokens=60))
    assert isinstance(json.loads(body["choices"][0]["message"]["content"])["n"], int)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "hot"},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        {"grammar": "root ::= ("},
        {"n": 9},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,x"}}]}]},
    ],
    ids=str,
)
async def test_bad_input_is_the_callers_fault_whatever_the_status(backend: Backend, fields: dict[str, Any]) -> None:
    with pytest.raises(BackendRefused) as caught:
        await collect(backend, chat(MODEL, stream=True, **fields))
    assert caught.value.info.status == 400


async def test_too_long_a_prompt_has_openais_code(backend: Backend) -> None:
    with pytest.raises(BackendRefused) as caught:
        await collect(backend, chat(MODEL, messages=[{"role": "user", "content": "word " * 3000}]))
    assert caught.value.info.code == "context_length_exceeded"


async def test_unknown_fields_are_no_error(backend: Backend) -> None:
    await collect(backend, chat(MODEL, max_tokens=2, unheard_of={"a": 1}, service_tier="flex", min_p=0.1))


async def test_slow_to_start_killed_and_back(own_llama: Callable[..., LlamaServer]) -> None:
    server = own_llama()
    backend = OpenAIBackend(BackendConfig(url=server.url))
    try:
        await until_healthy(backend)
        output = backend.run(chat(MODEL, stream=True, max_tokens=1900, ignore_eos=True))
        await anext(output)
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        with pytest.raises(BackendError) as caught:
            async for _ in output:
                pass
        assert caught.value.transient
        with pytest.raises(BackendUnavailable):
            await backend.health()
        with pytest.raises(BackendUnavailable):
            await collect(backend, chat(MODEL))
        await asyncio.to_thread(own_llama, server.port)
        await until_healthy(backend)
        await collect(backend, chat(MODEL, max_tokens=3))
    finally:
        await backend.close()


async def until_healthy(backend: Backend) -> None:
    """A server that still loads is unavailable, nothing else."""
    async with asyncio.timeout(60):
        while True:
            try:
                await backend.health()
                return
            except BackendUnavailable:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("feature", [STREAM, STREAM_OPTIONS, TOOL_STREAM])
@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
async def test_probes_find_what_the_server_has(llama: LlamaServer, path: str, feature: str) -> None:
    """And leave none of its slots at work."""
    client = HttpClient(llama.url)
    try:
        assert await lacks_text_feature(OpenAIClient(client, "/v1"), path, MODEL, feature) is False
        async with asyncio.timeout(10):
            while await busy_slots(llama):
                await asyncio.sleep(0.05)
    finally:
        await client.close()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_forced_tool_is_called(backend: Backend, stream: bool, choice: Any) -> None:
    """By a model that is far too small to choose it by itself."""
    parameters = {"type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"]}
    names = ["weather"] if choice == "required" else ["time", "weather"]
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in names]
    work = chat(MODEL, stream=stream, tools=tools, tool_choice=choice, max_tokens=200)
    data = b"".join([output.data async for output in backend.run(work) if isinstance(output, Chunk)])
    found = [json.loads(frame[6:]) for frame in data.split(b"\n\n")[:-1]] if stream else [json.loads(data)]
    parts = [one.get("delta") or one.get("message") or {} for event in found for one in event["choices"]]
    calls = [call["function"] for part in parts for call in part.get("tool_calls") or ()]
    assert [call["name"] for call in calls if call.get("name")] == ["weather"]
    assert isinstance(json.loads("".join(call.get("arguments") or "" for call in calls))["hot"], bool)
