"""Logs of all processes, asked over a bus in memory."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from backbone.testing.bus import MemoryBroker, MemoryGatewayBus, MemoryWorkerBus
from backbone.testing.registry import MemoryHub, MemoryRegistry
from gateway import log_search
from gateway.app import make_app
from gateway.auth.authenticator import Authenticator
from gateway.dependencies import Parts
from gateway.log_search import MAX_SEARCHES, LogSearch
from gateway.peers import GatewayPeers
from schemas.control import Control
from schemas.errors import RateLimited
from schemas.logs import LogAnswer, LogQuery, ProcessKind
from schemas.presence import WorkerPresence, WorkerState

KEY = "sk-test"
JOB = "job_" + "0" * 32


def answer(worker: str, **fields: Any) -> LogAnswer:
    return LogAnswer(id=worker, kind=ProcessKind.WORKER, last=9, is_complete=False, has_more=False, **fields)


class World:
    """Gateways and scripted workers."""

    def __init__(self) -> None:
        self.broker, self.hub = MemoryBroker(), MemoryHub()
        self.asked: list[tuple[str, ...]] = []

    async def gateway(self, name: str) -> LogSearch:
        bus, registry = MemoryGatewayBus(self.broker), MemoryRegistry(self.hub)
        await bus.start()
        await registry.start()
        peers = GatewayPeers(bus, name)
        search = LogSearch(bus, registry, peers, timeout_s=0.05)
        await peers.start()
        await search.start()
        await asyncio.sleep(0)
        return search

    async def worker(self, name: str, message: bytes | None) -> None:
        registry = MemoryRegistry(self.hub)
        await registry.start()
        await registry.announce(WorkerPresence(id=name, backend="echo", host="h", models=(), state=WorkerState.READY))
        bus = MemoryWorkerBus(self.broker, lambda _: None)

        def on_control(data: bytes) -> None:
            request = Control.model_validate_json(data).logs
            assert request is not None
            self.asked.append(request.texts)
            if message is not None:
                bus.send_event(request.reply, message)

        await bus.subscribe_control(name, on_control)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    def own(query: LogQuery, kind: ProcessKind, process: str) -> bytes:
        assert kind is ProcessKind.GATEWAY
        line = (
            b'{"timestamp":"2026-11-30T15:00:01Z","level":"info","event":"request.finished","job":"%b"}' % JOB.encode()
        )
        found = LogAnswer(id=process, kind=kind, last=3, is_complete=True, has_more=False)
        return found.encode([line] if "req_1" in query.texts else [])

    monkeypatch.setattr(log_search, "answer_log_query", own)
    return World()


async def test_every_process_is_asked(world: World) -> None:
    """Both gateways and the workers; a request's job is searched too; a silent worker and one that sends rubbish are named."""
    line = b'{"timestamp":"2026-11-30T15:00:00Z","level":"info","event":"attempt.finished","tokens":4}'
    await world.worker("good", answer("good").encode([line]))
    await world.worker("silent", None)
    await world.worker("wild", b"rubbish")
    search = await world.gateway("one")
    await world.gateway("two")
    await asyncio.sleep(0)
    app = make_app(cast("Parts", SimpleNamespace(log_search=search, auth=Authenticator(KEY))))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    http.headers["authorization"] = f"Bearer {KEY}"
    async with http:
        found = (await http.get("/v1/logs?id=req_1")).json()
        wrong = await http.get("/v1/logs?id=nats")
    assert wrong.status_code == 400
    assert [(one["process"], one["event"]) for one in found["data"]] == [
        ("good", "attempt.finished"), ("one", "request.finished"), ("two", "request.finished"),
    ]  # fmt: skip
    assert found["data"][0]["fields"] == {"tokens": 4}
    assert {(one["kind"], one["id"], one["answered"], one["lines"]) for one in found["processes"]} == {
        ("gateway", "one", True, 1), ("gateway", "two", True, 1), ("worker", "good", True, 1),
        ("worker", "silent", False, 0), ("worker", "wild", False, 0),
    }  # fmt: skip
    assert set(world.asked) == {("req_1",), ("req_1", JOB)}


async def test_one_worker_cannot_answer_for_another(world: World) -> None:
    """Its answer counts as its own, whatever it says of itself."""
    await world.worker("evil", answer("good").encode([b'{"event":"forged"}']))
    await world.worker("good", None)
    search = await world.gateway("one")
    found = {one.id: one.lines for one in await search.ask(LogQuery(texts=("req_2",)))}
    assert found == {"one": [], "evil": [{"event": "forged"}], "good": []}


async def test_one_worker_is_asked_alone(world: World) -> None:
    """For the tail of its log; as soon as it answers, there is nothing left to wait for."""
    await world.worker("good", answer("good").encode([b'{"event":"x"}']))
    [found] = await (await world.gateway("one")).ask(LogQuery(after=8), worker="good")
    assert (found.id, found.lines) == ("good", [{"event": "x"}])
    assert found.answer is not None
    assert found.answer.last == 9


async def test_searches_are_bounded(world: World) -> None:
    """One more at a time is refused; nothing listens any more when all have ended."""
    await world.worker("silent", None)
    search = await world.gateway("one")
    before = len(world.broker.listeners)
    asked = [asyncio.create_task(search.ask(LogQuery())) for _ in range(MAX_SEARCHES)]
    await asyncio.sleep(0)
    with pytest.raises(RateLimited):
        await search.ask(LogQuery())
    await asyncio.gather(*asked)
    assert len(world.broker.listeners) == before


async def test_a_gateway_that_leaves_is_asked_no_more(world: World) -> None:
    """And one that starts is known at once."""
    buses = [MemoryGatewayBus(world.broker) for _ in range(2)]
    first, second = (GatewayPeers(bus, name) for bus, name in zip(buses, "ab", strict=True))
    await first.start()
    await second.start()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert first.names == second.names == {"a", "b"}
    await second.close()
    await asyncio.sleep(0)
    assert first.names == {"a"}
    await first.close()
