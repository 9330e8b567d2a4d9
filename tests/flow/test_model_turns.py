"""A server that cannot hold its models, behind real gateways and workers: few loads, for callers who wait and for jobs; names, context and state."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.backends.doubles.ollama import OllamaDouble, StoredModel
from tests.cluster import Cluster, Crew
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS = 40
ALONE = 21
"""Loads that Ollama pays alone for 40 requests that alternate between two models, by measurement."""


def two_models() -> dict[str, StoredModel]:
    """Models with names of their own: other tests use the same gateway."""
    name = uuid.uuid4().hex[:8]
    return {f"{name}-{number}:latest": StoredModel() for number in range(2)}


@pytest_asyncio.fixture(loop_scope="module")
async def ollama() -> AsyncIterator[OllamaDouble]:
    async with OllamaDouble(max_loaded=1) as server:
        server.models = two_models()
        server.behave(load_s=0.2, delay_s=0.01, discovery_s=0.02)
        yield server


async def entry(cluster: Cluster, name: str) -> dict[str, Any] | None:
    answer = await cluster.get(f"/v1/models/{name}")
    return answer.json() if answer.status_code == 200 else None


async def serving(crew: Crew, cluster: Cluster, server: OllamaDouble, eventually: Eventually) -> str:
    worker = await crew.start(backend="ollama", WORKER_BACKEND_URL=server.url, WORKER_MODELS="")
    for name in server.models:
        await eventually(lambda name=name: entry(cluster, name))
    return worker


def alternating(server: OllamaDouble) -> list[dict[str, Any]]:
    names = itertools.islice(itertools.cycle(server.models), REQUESTS)
    return [{"model": name, "messages": [{"role": "user", "content": "hello"}]} for name in names]


async def test_requests_that_alternate_between_models(
    cluster: Cluster, crew: Crew, ollama: OllamaDouble, eventually: Eventually
) -> None:
    await serving(crew, cluster, ollama, eventually)
    answers = await asyncio.gather(*(cluster.post("/v1/chat/completions", body) for body in alternating(ollama)))
    assert {answer.status_code for answer in answers} == {200}
    assert ollama.counts["load"] <= 9
    assert ollama.counts["/api/generate"] == 0, "no load in a call of its own"


async def test_jobs_that_alternate_between_models(
    cluster: Cluster, crew: Crew, ollama: OllamaDouble, eventually: Eventually
) -> None:
    """The job that shows how old its queue is goes back, and still ends once."""
    await serving(crew, cluster, ollama, eventually)
    jobs = [
        (await cluster.post("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": body})).json()["id"]
        for body in alternating(ollama)
    ]
    for job in jobs:
        ended = (await cluster.get(f"/v1/jobs/{job}?wait=30")).json()
        assert (ended["status"], ended["attempts"]) == ("completed", 1)
    assert ollama.counts["load"] <= ALONE
    assert ollama.counts["/api/chat"] == REQUESTS


async def test_two_workers_with_a_server_each(
    cluster: Cluster, crew: Crew, ollama: OllamaDouble, eventually: Eventually
) -> None:
    async with OllamaDouble(max_loaded=1) as other:
        other.models, other.behavior = ollama.models, ollama.behavior
        for server in (ollama, other):
            await serving(crew, cluster, server, eventually)
        answers = await asyncio.gather(*(cluster.post("/v1/chat/completions", body) for body in alternating(ollama)))
        assert {answer.status_code for answer in answers} == {200}
        assert ollama.counts["load"] + other.counts["load"] <= ALONE


async def test_a_model_that_waits_gets_its_turn(
    cluster: Cluster, crew: Crew, ollama: OllamaDouble, eventually: Eventually
) -> None:
    """While jobs of the other one come without end."""
    await crew.start(backend="ollama", WORKER_BACKEND_URL=ollama.url, WORKER_MODELS="", WORKER_SWAP_PATIENCE_S="1")
    first, second = ollama.models
    for name in (first, second):
        await eventually(lambda name=name: entry(cluster, name))
    stop = asyncio.Event()

    async def endless() -> None:
        while not stop.is_set():
            await cluster.post("/v1/chat/completions", alternating(ollama)[0])

    callers = [asyncio.create_task(endless()) for _ in range(16)]  # so that jobs of it always wait
    try:
        for _ in range(3):
            before = ollama.counts["/api/chat"]
            await eventually(lambda before=before: first in ollama.loaded and ollama.counts["/api/chat"] > before + 8)
            async with asyncio.timeout(10):  # patience, two loads, and what is in hand, many times over
                answer = await cluster.post("/v1/chat/completions", alternating(ollama)[1])
            assert answer.status_code == 200
    finally:
        stop.set()
        await asyncio.gather(*callers)


async def test_a_name_without_a_tag_and_where_the_model_is(
    cluster: Cluster, crew: Crew, ollama: OllamaDouble, eventually: Eventually
) -> None:
    """One entry in the list; its context is the one that the server has loaded it with."""
    worker = await serving(crew, cluster, ollama, eventually)
    name, other = ollama.models
    bare = name.removesuffix(":latest")
    shown = await entry(cluster, bare)
    assert shown is not None
    assert (shown["id"], shown["state"], shown["workers"], shown["context_length"]) == (
        name,
        "cold",
        {worker: "cold"},
        8192,
    )
    body = {"model": bare, "messages": [{"role": "user", "content": "hello"}]}
    answer = (await cluster.post("/v1/chat/completions", body)).json()
    assert answer["model"] == bare

    async def loaded() -> bool:
        now = await entry(cluster, bare)
        return now is not None and (now["state"], now["context_length"]) == ("loaded", 4096)

    await eventually(loaded)
    listed = [model["id"] for model in (await cluster.get("/v1/models")).json()["data"]]
    assert [one for one in listed if one.startswith(bare)] == [name]
    assert (await cluster.post("/v1/chat/completions", body | {"model": other})).status_code == 200

    async def gave_way() -> bool:
        now = await entry(cluster, bare)
        return now is not None and now["state"] == "cold"

    await eventually(gave_way)
    long = [{"role": "user", "content": "word " * 5000}]
    refused = await cluster.post("/v1/chat/completions", {"model": bare, "messages": long})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
