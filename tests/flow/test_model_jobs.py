"""Models pulled, loaded and unloaded by callers, and used at once: real gateway, real worker, a double of Ollama."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.backends.double_ollama import CHAT, EMBED, OllamaDouble
from tests.cluster import Cluster, Crew
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEW = "qwen3:0.6b"


@pytest_asyncio.fixture(loop_scope="module")
async def ollama() -> AsyncIterator[OllamaDouble]:
    async with OllamaDouble() as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def worker(crew: Crew, ollama: OllamaDouble) -> str:
    return await crew.start(backend="ollama", WORKER_BACKEND_URL=ollama.url, WORKER_MODELS="")


async def listed(cluster: Cluster) -> list[str]:
    return [model["id"] for model in (await cluster.get("/v1/models")).json()["data"]]


async def listed_with(cluster: Cluster, name: str) -> bool:
    return name in await listed(cluster)


async def test_a_model_is_pulled_and_used(
    cluster: Cluster, ollama: OllamaDouble, worker: str, eventually: Eventually
) -> None:
    """With progress on the way, and listed when it is there; the worker itself is never listed as a model."""
    ollama.behave(delay_s=0.01)
    lines = [line async for line in cluster.stream({"model": NEW, "worker": worker}, path="/v1/models/pull")]
    assert lines[-1] == "[DONE]"
    frames = [json.loads(line) for line in lines[:-1]]
    assert frames[-1] == {"object": "model.pull", "model": NEW, "status": "success"}
    assert 0.5 in [round(frame.get("fraction") or 0, 1) for frame in frames]

    await eventually(lambda: listed_with(cluster, NEW))
    assert not [name for name in await listed(cluster) if name.startswith("worker:")]
    body = {"model": NEW, "messages": [{"role": "user", "content": "hello"}]}
    answer = (await cluster.post("/v1/chat/completions", body)).json()
    assert answer["choices"][0]["message"]["content"] == "Hello there, world!"
    assert NEW in ollama.loaded


async def test_a_model_is_loaded_and_unloaded(cluster: Cluster, ollama: OllamaDouble, worker: str) -> None:
    loaded = await cluster.post("/v1/models/load", {"model": CHAT, "worker": worker})
    assert loaded.json() == {"object": "model.load", "model": CHAT, "status": "success"}
    assert CHAT in ollama.loaded
    await cluster.post("/v1/models/unload", {"model": CHAT, "worker": worker})
    assert CHAT not in ollama.loaded


async def test_what_cannot_be_done_is_said(cluster: Cluster, worker: str) -> None:
    """An unknown worker is a 400 that names those there are; a model that exists nowhere is a 404."""
    answer = await cluster.post("/v1/models/pull", {"model": NEW, "worker": "nobody"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "worker")
    assert worker in answer.json()["error"]["message"]
    answer = await cluster.post("/v1/models/pull", {"model": "no-such-model", "worker": worker})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_text_and_embeddings_beside_it(cluster: Cluster, worker: str) -> None:
    answer = (await cluster.post("/v1/embeddings", {"model": EMBED, "input": ["one", "two"]})).json()
    assert [len(item["embedding"]) for item in answer["data"]] == [64, 64]
    answer = (await cluster.post("/v1/completions", {"model": CHAT, "prompt": "Once"})).json()
    assert answer["choices"][0]["text"] == "Hello there, world!"
