"""Parameters that a server lacks, as agents send them by the official OpenAI SDK: adapted and named, or refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.backends.doubles.ollama import CHAT, OllamaDouble
from tests.cluster import KEY, Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

QUESTION: Any = [{"role": "user", "content": "How is the weather in Lisbon?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
CALL = {"function": {"name": "weather", "arguments": {"city": "Lisbon"}}}
AGENT: Any = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
NAMES = "tool_choice, parallel_tool_calls"
STRICT, LENIENT = "ollama-strict", "ollama-lenient"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def ollama(cluster: Cluster) -> AsyncIterator[OllamaDouble]:
    """A worker that adapts, an alias that refuses; a worker that refuses, an alias that adapts."""
    async with OllamaDouble() as server:
        server.behave(calls=(CALL, CALL), words=())
        server.loaded = {name: {} for name in server.models}
        settings: dict[str, Any] = {"WORKER_BACKEND": "ollama", "WORKER_BACKEND_URL": server.url}
        await cluster.start_worker(**settings, WORKER_MODELS=CHAT)
        await cluster.start_worker(**settings, WORKER_MODELS="llava", WORKER_UNSUPPORTED_PARAMETERS="refuse")
        headers = {"authorization": f"Bearer {KEY}"}
        for alias, target, policy in ((STRICT, CHAT, "refuse"), (LENIENT, "llava", "adapt")):
            body = {"targets": [target], "unsupported_parameters": policy}
            answer = await cluster.http.put(f"{cluster.url}/v1/aliases/{alias}", json=body, headers=headers)
            assert (answer.status_code, answer.json()["unsupported_parameters"]) == (200, policy)
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: Cluster, ollama: OllamaDouble) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=cluster.url + "/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        for model in (CHAT, STRICT, LENIENT):
            async with asyncio.timeout(20):
                while model not in [one.id async for one in client.models.list()]:
                    await asyncio.sleep(0.05)
        yield client


async def test_an_agents_request_is_answered(client: AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(model=CHAT, messages=QUESTION, **AGENT)
    [call] = raw.parse().choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Lisbon"})
    assert raw.headers["x-nexus-adapted"] == NAMES


async def test_a_stream_says_so_in_its_head(client: AsyncOpenAI) -> None:
    async with client.chat.completions.with_streaming_response.create(
        model=CHAT, messages=QUESTION, stream=True, **AGENT
    ) as raw:
        assert raw.headers["x-nexus-adapted"] == NAMES
        chunks = [chunk async for chunk in await raw.parse()]
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert [call.function.name for call in calls if call.function and call.function.name] == ["weather"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_several_choices_and_their_usage(client: AsyncOpenAI, ollama: OllamaDouble) -> None:
    ollama.behave()
    answer = await client.chat.completions.create(model=CHAT, messages=QUESTION, n=2)
    assert [(one.index, one.message.content) for one in answer.choices] == [(n, "Hello there, world!") for n in (0, 1)]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    texts = ["", ""]
    stream = await client.chat.completions.create(model=CHAT, messages=QUESTION, n=2, stream=True)
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello there, world!"] * 2
    ollama.behave(calls=(CALL, CALL), words=())


async def test_a_request_without_such_parameters_has_no_such_header(client: AsyncOpenAI) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "auto", "n": 1}):
        raw = await client.chat.completions.with_raw_response.create(model=CHAT, messages=QUESTION, **fields)
        assert "x-nexus-adapted" not in raw.headers


async def test_the_aliass_word_counts_more_than_the_workers(client: AsyncOpenAI) -> None:
    for model in (STRICT, "llava"):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=model, messages=QUESTION, n=2)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "n")
        assert model in caught.value.message
    raw = await client.chat.completions.with_raw_response.create(model=LENIENT, messages=QUESTION, n=2)
    assert (len(raw.parse().choices), raw.headers["x-nexus-adapted"]) == (2, "n")


async def test_a_durable_job_keeps_it(client: AsyncOpenAI, cluster: Cluster) -> None:
    """In its record, its events, and with its result; also for one who waits, streamed or not."""
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"model": CHAT, "messages": QUESTION, **AGENT}
    for stream in (False, True):
        request = {"endpoint": "/v1/chat/completions", "body": body | {"stream": stream}}
        job = (await cluster.http.post(f"{cluster.url}/v1/jobs", json=request, headers=headers)).json()["id"]
        record = (await cluster.http.get(f"{cluster.url}/v1/jobs/{job}?wait=30", headers=headers)).json()
        assert (record["status"], record["adapted"]) == ("completed", NAMES.split(", "))
        result = await cluster.http.get(f"{cluster.url}/v1/jobs/{job}/result", headers=headers)
        assert (result.status_code, result.headers["x-nexus-adapted"]) == (200, NAMES)
        events = (await cluster.http.get(f"{cluster.url}/v1/jobs/{job}/events", headers=headers)).text
        assert "event: job.adapted\n" in events
        key = {"idempotency-key": f"adapted-{stream}"}
        waited = await _whole(cluster, body | {"stream": stream}, headers | key)
        assert (waited.status_code, waited.headers["x-nexus-adapted"]) == (200, NAMES)


async def _whole(cluster: Cluster, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
    return await cluster.http.post(f"{cluster.url}/v1/chat/completions", json=body, headers=headers)


async def test_responses_are_answered_too(client: AsyncOpenAI) -> None:
    """As Codex sends them."""
    tools: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}]
    fields: Any = {"model": CHAT, "input": "x", "tools": tools, "parallel_tool_calls": False, "store": False}
    raw = await client.responses.with_raw_response.create(**fields)
    assert [item.type for item in raw.parse().output] == ["function_call"]
    assert raw.headers["x-nexus-adapted"] == "parallel_tool_calls"
    async with client.responses.with_streaming_response.create(**fields, stream=True) as streamed:
        assert streamed.headers["x-nexus-adapted"] == "parallel_tool_calls"
        kinds = [event.type async for event in await streamed.parse()]
    assert kinds[-1] == "response.completed"
