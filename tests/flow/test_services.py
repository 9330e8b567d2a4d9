"""HTTP services adopted by a whole Nexus: entered, moved, away, back and removed, while it runs."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.backends.doubles.service import ServiceDouble, embedding
from tests.cluster import Cluster, chat
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "Hello there, world!"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def worker(cluster: Cluster) -> str:
    """One worker for all services."""
    return await cluster.start_worker("service")


class Entered:
    """Services of one test, entered straight in etcd as scripts do it."""

    def __init__(self, cluster: Cluster, stack: AsyncExitStack) -> None:
        self.cluster = cluster
        self._stack = stack
        self._names: set[str] = set()

    async def double(self, name: str, *paths: str) -> ServiceDouble:
        return await self._stack.enter_async_context(ServiceDouble(name, *paths))

    async def enter(self, name: str, url: str) -> None:
        self._names.add(name)
        await self._etcd("put", name, value={"name": name, "base_url": url, "metadata_url": f"{url}/v1/metadata"})

    async def add(self, name: str, *paths: str) -> ServiceDouble:
        double = await self.double(name, *paths)
        await self.enter(name, double.url)
        return double

    async def remove(self, name: str) -> None:
        self._names.discard(name)
        await self._etcd("deleterange", name)

    async def remove_all(self) -> None:
        for name in list(self._names):
            await self.remove(name)

    async def said(self, model: str) -> str:
        answer = await self.cluster.post("/v1/chat/completions", chat(model=model))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    async def live(self, worker: str) -> set[str]:
        """What the registry says that the worker offers."""
        workers = (await self.cluster.get("/v1/workers")).json()["data"]
        one = next(one for one in workers if one["id"] == worker)
        return {model["name"] for model in one["models"]} if one["state"] == "ready" else set()

    async def _etcd(self, what: str, name: str, value: dict[str, Any] | None = None) -> None:
        fields = {"key": f"/nexus/services/{name}"} | ({"value": json.dumps(value)} if value is not None else {})
        coded = {key: base64.b64encode(text.encode()).decode() for key, text in fields.items()}
        async with httpx.AsyncClient() as http:
            answer = await http.post(f"{self.cluster.etcd.url}/v3/kv/{what}", json=coded)
        assert answer.status_code == 200, answer.text


@pytest_asyncio.fixture(loop_scope="module")
async def services(cluster: Cluster, worker: str, eventually: Eventually) -> AsyncIterator[Entered]:
    async with AsyncExitStack() as stack:
        entered = Entered(cluster, stack)
        yield entered
        await entered.remove_all()


async def test_a_service_entered_in_etcd_is_served_without_touching_nexus(
    services: Entered, worker: str, eventually: Eventually
) -> None:
    """By a model of its own name, streamed or not; the list of services says how it is."""
    await services.add("talker")
    await eventually(lambda: _has(services, worker, "talker"))
    assert await services.said("talker") == TEXT
    lines = [line async for line in services.cluster.stream(chat(model="talker"))]
    assert lines[-1] == "[DONE]"
    listed = (await services.cluster.get("/v1/services")).json()["data"]
    assert [(one["id"], one["state"]) for one in listed] == [("talker", "ready")]


async def test_a_service_moves_while_a_stream_is_under_way(
    services: Entered, worker: str, eventually: Eventually
) -> None:
    """The stream ends where it began; what comes after goes to the new place."""
    old = await services.add("mover")
    await eventually(lambda: _has(services, worker, "mover"))
    old.behave(words=("old ",) * 50, token_delay_s=0.02)
    stream = services.cluster.record(chat(model="mover", stream=True))
    await eventually(lambda: bool(stream.texts))
    new = await services.double("mover")
    new.behave(words=("new",))
    await services.enter("mover", new.url)

    async def moved() -> bool:
        return await services.said("mover") == "new"

    await eventually(moved)
    assert not stream.ended
    await stream.end()
    assert stream.lines[-1] == "[DONE]"
    assert "".join(stream.texts) == "old " * 50


async def test_a_service_that_dies_is_withdrawn_and_offered_again_when_it_is_back(
    services: Entered, worker: str, eventually: Eventually
) -> None:
    """The others are served all the while."""
    other = await services.add("other")
    double = await services.add("mortal")
    await eventually(lambda: _has(services, worker, "mortal", "other"))
    await double.kill()
    await eventually(lambda: _has(services, worker, "other"))
    assert await services.said("other") == TEXT
    refused = await services.cluster.post("/v1/chat/completions", chat(model="mortal"))
    assert refused.status_code == 503
    await double.start()
    await eventually(lambda: _has(services, worker, "mortal", "other"))
    assert await services.said("mortal") == TEXT
    assert other.posted


async def test_a_removed_service_is_no_longer_offered(services: Entered, worker: str, eventually: Eventually) -> None:
    await services.add("brief")
    await eventually(lambda: _has(services, worker, "brief"))
    await services.remove("brief")
    await eventually(lambda: _has(services, worker))


async def test_of_two_services_with_one_model_the_other_stands_in(
    services: Entered, worker: str, eventually: Eventually
) -> None:
    """A caller does not notice that the first one died."""
    doubles = [await services.double(name) for name in ("a-first", "b-second")]
    for double in doubles:
        double.documents["/v1/metadata"]["models"] = ["shared"]
        await services.enter(double.name, double.url)
    await eventually(lambda: _has(services, worker, "shared"))
    assert await services.said("shared") == TEXT
    await doubles[0].kill()
    assert await services.said("shared") == TEXT
    assert doubles[1].posted


async def test_a_stream_that_the_caller_leaves_is_stopped_at_the_service(
    services: Entered, worker: str, eventually: Eventually
) -> None:
    double = await services.add("endless")
    await eventually(lambda: _has(services, worker, "endless"))
    double.behave(words=("on ",) * 5000, token_delay_s=0.02)
    stream = services.cluster.record(chat(model="endless", stream=True))
    await eventually(lambda: bool(stream.texts))
    await stream.hang_up()
    await eventually(lambda: double.streaming == 0)


async def test_the_gateway_s_own_route_enters_moves_and_removes(
    services: Entered, worker: str, eventually: Eventually
) -> None:
    """`PUT` and `DELETE /v1/services`, for another kind of endpoint than text."""
    double = await services.double("vectors", "/v1/embeddings")
    double.answers["/v1/embeddings"] = embedding([0.5, 0.25])
    http = services.cluster.http
    entered = await http.put(f"{services.cluster.url}/v1/services/vectors", json={"base_url": double.url})
    assert entered.status_code == 200
    await eventually(lambda: _has(services, worker, "vectors"))
    answer = await services.cluster.post("/v1/embeddings", {"model": "vectors", "input": "x"})
    assert answer.json()["data"][0]["embedding"] == [0.5, 0.25]
    assert (await http.delete(f"{services.cluster.url}/v1/services/vectors")).status_code == 200
    await eventually(lambda: _has(services, worker))


async def _has(services: Entered, worker: str, *models: str) -> bool:
    return await services.live(worker) == set(models)
