"""A worker of a server that cannot hold all its models: jobs of one model run together, and no model waits forever."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Literal

import aiohttp
import pytest

from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.bus import MemoryBroker, MemoryGatewayBus, MemoryWorkerBus
from backbone.testing.job_log import MemoryWorkerLog
from backbone.testing.registry import MemoryHub, MemoryRegistry
from gateway.dispatcher import Dispatcher
from gateway.http.inference_body import ReceivedRequest
from gateway.metrics import GatewayMetrics
from gateway.sync.request_state import SyncRequest
from gateway.sync.submitter import SyncSubmitter
from schemas.jobs import Capability, Lane, Limits
from tests.backends.doubles.ollama import OllamaDouble, StoredModel
from tests.backends.doubles.router import RouterDouble
from workers.backends.base import Backend, BackendConfig, make_backend
from workers.metrics import WorkerMetrics
from workers.worker import Worker

MODELS = ("alpha:latest", "beta:latest", "gamma:latest")
WORDS = ("one", " two")


class Rig:
    """A gateway's dispatcher and workers, each with an Ollama of its own."""

    def __init__(self) -> None:
        self.broker, self.hub = MemoryBroker(), MemoryHub()
        self.registry = MemoryRegistry(self.hub)
        self.dispatcher = Dispatcher(MemoryGatewayBus(self.broker), self.registry, GatewayMetrics(), Limits())
        self.submitter = SyncSubmitter(self.dispatcher, 15.0)
        self.ended: list[str] = []
        """The models of the jobs that have ended, in order."""
        self._lives: list[tuple[Worker, asyncio.Task[None]]] = []

    async def start(self) -> None:
        await self.dispatcher.bus.start()
        await self.registry.start()
        await self.dispatcher.start()
        await self.submitter.start()

    async def close(self) -> None:
        for worker, life in self._lives:
            worker.drain()
            await life
        await self.submitter.close()
        await self.dispatcher.close()

    def add(self, server: OllamaDouble, slots: int = 4, patience_s: float = 10.0) -> None:
        self.add_backend(make_backend("ollama", BackendConfig(url=server.url)), slots, patience_s)

    def add_backend(self, backend: Backend, slots: int = 4, patience_s: float = 10.0) -> None:
        worker = Worker(
            worker_id=f"w{len(self._lives)}", host="h", backend=backend,
            blobs=MemoryBlobStore(), log=MemoryWorkerLog(self.broker), registry=MemoryRegistry(self.hub),
            metrics=WorkerMetrics(), ack_wait_s=15.0, slots=slots, health_interval_s=0.5, drain_s=0.2, swap_patience_s=patience_s,
        )  # fmt: skip
        life = asyncio.create_task(worker.run(MemoryWorkerBus(self.broker, worker.on_job)))
        self._lives.append((worker, life))

    async def ready(self) -> None:
        async with asyncio.timeout(10):
            while not self.dispatcher.catalog.list_live() or any(w.state != "ready" for w, _ in self._lives):
                await asyncio.sleep(0.005)

    async def run(self, model: str, lane: Lane = Lane.DEFAULT) -> None:
        """Run one request to its end."""
        call = self._call(model, lane)
        async with asyncio.timeout(60):
            await call.wait_until_ended()
        assert call.error is None
        answer = json.loads(call.take_output())
        assert answer["choices"][0]["message"]["content"] == "".join(WORDS)
        self.ended.append(model)
        self.submitter.finish(call)

    async def run_all(self, models: Iterable[str], callers: int) -> None:
        """Run requests in this order, by concurrent callers."""
        waiting = iter(list(models))

        async def caller() -> None:
            for model in waiting:
                await self.run(model)

        await asyncio.gather(*(caller() for _ in range(callers)))

    async def holds(self, server: OllamaDouble, model: str) -> None:
        """Return when the server holds the model, and has run jobs of it."""
        before = self.ended.count(model)
        async with asyncio.timeout(20):
            while model not in server.loaded or self.ended.count(model) < before + 8:
                await asyncio.sleep(0.005)

    def _call(self, model: str, lane: Lane) -> SyncRequest:
        body = json.dumps(
            {"model": model, "messages": [{"role": "user", "content": "count"}], "max_tokens": 4}
        ).encode()
        return self.submitter.submit(
            request_id="req", endpoint="/v1/chat/completions", capability=Capability.CHAT, lane=lane, public_model=model,
            stream=False, owner="o", received=ReceivedRequest(None, body),
        )  # fmt: skip


@asynccontextmanager
async def swapping(count: int = 2, max_loaded: int | None = 1, **behavior: float) -> AsyncIterator[OllamaDouble]:
    """An Ollama with so many models that holds `max_loaded` at once."""
    async with OllamaDouble(max_loaded) as server:
        server.models = {name: StoredModel() for name in MODELS[:count]}
        server.behave(**{"words": WORDS, "load_s": 0.05, "delay_s": 0.005, "discovery_s": 0.01, **behavior})
        yield server


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    await made.start()
    yield made
    await made.close()


def interleaved(count: int, models: int = 2) -> list[str]:
    return list(itertools.islice(itertools.cycle(MODELS[:models]), count))


async def loads_alone(requests: Iterable[str], callers: int, *, count: int = 2, max_loaded: int | None = 1) -> int:
    """Return how many loads the server alone needs for these requests of concurrent callers."""
    waiting = iter(requests)
    async with swapping(count, max_loaded) as server, aiohttp.ClientSession() as http:

        async def caller() -> None:
            for model in waiting:
                body = {"model": model, "messages": [{"role": "user", "content": "count"}]}
                async with http.post(f"{server.url}/api/chat", json=body) as answer:
                    assert answer.status == 200
                    await answer.read()

        await asyncio.gather(*(caller() for _ in range(callers)))
        return server.counts["load"]


@pytest.mark.parametrize("callers", [2, 4, 40])
async def test_forty_interleaved_requests_cost_no_more_loads_than_the_server_alone(rig: Rig, callers: int) -> None:
    """With many waiting jobs it needs far fewer: the jobs of one model run together."""
    alone = await loads_alone(interleaved(40), callers)
    async with swapping() as server:
        rig.add(server)
        await rig.ready()
        await rig.run_all(interleaved(40), callers)
        assert server.counts["load"] <= alone
        if callers == 40:
            assert server.counts["load"] <= 9
        await rig.close()


async def test_two_workers_on_two_servers_cost_no_more_loads_than_one_server(rig: Rig) -> None:
    alone = await loads_alone(interleaved(40), 8)
    async with swapping() as one, swapping() as other:
        for server in (one, other):
            rig.add(server)
        await rig.ready()
        await rig.run_all(interleaved(40), 8)
        assert one.counts["load"] + other.counts["load"] <= alone
        assert one.counts["/api/chat"] + other.counts["/api/chat"] == 40
        await rig.close()


async def test_a_model_that_another_worker_serves_is_left_to_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long its jobs have been coming, each worker keeps the model that it has loaded."""
    monkeypatch.setattr(
        "workers.model_admission.MIN_COLD_DELAY_S", 1.0
    )  # on a busy machine 50 ms look as if nobody served it
    async with swapping(delay_s=0.02) as one, swapping(delay_s=0.02) as other:
        for server, model in ((one, MODELS[0]), (other, MODELS[1])):
            server.loaded = {model: {}}
            rig.add(server, slots=2, patience_s=0.3)
        await rig.ready()
        await asyncio.gather(*(rig.run_all([model] * 60, 2) for model in MODELS[:2]))
        assert one.counts["load"] + other.counts["load"] <= 2
        await rig.close()


async def test_a_model_waits_no_longer_than_the_patience(rig: Rig) -> None:
    """Although jobs of the other model keep coming, that model yields, and the waiting one is served."""
    async with swapping() as server:
        rig.add(server, patience_s=0.3)
        await rig.ready()
        await rig.run_all(interleaved(6), 6)  # the worker sees that the server swaps
        stop = asyncio.Event()

        async def callers() -> None:
            while not stop.is_set():
                await rig.run(MODELS[0])

        endless = [asyncio.create_task(callers()) for _ in range(24)]  # so that jobs of it always wait
        for _ in range(3):
            await rig.holds(server, MODELS[0])
            async with asyncio.timeout(15):  # many times the patience, a load, and the jobs in hand
                await rig.run(MODELS[1])
        stop.set()
        await asyncio.gather(*endless)
        await rig.close()


async def test_a_higher_lane_does_not_wait_for_the_patience(rig: Rig) -> None:
    async with swapping(delay_s=0.03) as server:
        rig.add(server, patience_s=60)
        await rig.ready()
        await rig.run_all(interleaved(6), 6)
        default = [asyncio.create_task(rig.run(MODELS[0])) for _ in range(240)]
        await rig.holds(server, MODELS[0])
        await rig.run(MODELS[1], Lane.PRIORITY)
        assert sum(not task.done() for task in default) > 40, "it waited for the jobs of the default lane"
        await asyncio.gather(*default)
        await rig.close()


async def test_a_server_that_holds_all_its_models_runs_them_at_once(rig: Rig) -> None:
    """The worker learns that they fit: every slot is busy, whatever its model."""
    async with swapping(max_loaded=None, load_s=0.01) as server:
        rig.add(server)
        await rig.ready()
        await rig.run_all(interleaved(8), 8)
        assert server.counts["load"] == 2
        server.behave(words=WORDS, delay_s=0.5)
        calls = [asyncio.create_task(rig.run(model)) for model in interleaved(4)]
        async with asyncio.timeout(10):
            while server.running < 4:
                await asyncio.sleep(0.005)
        await asyncio.gather(*calls)
        await rig.close()


async def test_models_that_fit_beside_each_other_stay_beside_each_other(rig: Rig) -> None:
    """The server holds two of three models at once, and the worker learns that."""
    alone = await loads_alone(interleaved(60, 3), 12, count=3, max_loaded=2)
    async with swapping(count=3, max_loaded=2) as server:
        rig.add(server)
        await rig.ready()
        await rig.run_all(interleaved(60, 3), 12)
        assert server.counts["load"] <= alone
        before = server.counts["load"]
        await rig.run_all([next(iter(server.loaded)), list(server.loaded)[1]] * 10, 4)
        assert server.counts["load"] == before
        await rig.close()


@pytest.mark.parametrize("kind", ["llamacpp", "llama-swap"])
async def test_routers_before_llama_cpp_swap_no_more_often_either(
    rig: Rig, kind: Literal["llamacpp", "llama-swap"]
) -> None:
    """The worker reads the states that each router gives its models."""
    async with RouterDouble(MODELS[:2], 1, kind) as router:
        rig.add_backend(make_backend("openai", BackendConfig(url=router.url)))
        await rig.ready()
        await rig.run_all(interleaved(40), 40)
        assert router.loads <= 9
        await rig.close()


async def test_a_router_with_room_for_all_runs_them_at_once(rig: Rig) -> None:
    async with RouterDouble(MODELS[:2], 2) as router:
        rig.add_backend(make_backend("openai", BackendConfig(url=router.url)))
        await rig.ready()
        await rig.run_all(interleaved(40), 8)
        assert router.loads == 2
        await rig.close()


async def test_a_model_gets_its_turn_beside_answers_in_one_piece(rig: Rig) -> None:
    """Overlapping jobs without output before their end do not look like an endless load."""
    async with RouterDouble(MODELS[:2], 1) as router:
        router.whole_after_s = 0.1
        rig.add_backend(make_backend("openai", BackendConfig(url=router.url)), patience_s=0.5)
        await rig.ready()
        stop = asyncio.Event()

        async def callers(number: int) -> None:
            await asyncio.sleep(0.023 * number)
            while not stop.is_set():
                await rig.run(MODELS[0])

        endless = [asyncio.create_task(callers(number)) for number in range(8)]
        await asyncio.sleep(1)
        async with asyncio.timeout(10):
            await rig.run(MODELS[1])
        stop.set()
        await asyncio.gather(*endless)
        await rig.close()
