"""The overview as its followers receive it: computed once for all of them, and while NATS is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
import pytest

from backbone.bus.bus import Queue
from backbone.testing.bus import MemoryBroker, MemoryGatewayBus
from backbone.testing.registry import MemoryHub, MemoryRegistry
from backbone.testing.store import MemoryStore
from gateway.dispatcher import Dispatcher
from gateway.health import ReadinessCheck, ShutdownState
from gateway.metrics import GatewayMetrics
from gateway.overview import monitor as monitor_module
from gateway.overview.monitor import OverviewMonitor, OverviewSources
from gateway.overview.traffic import TrafficExchange
from schemas.jobs import Capability, Lane, Limits
from schemas.presence import ModelOffer, WorkerPresence
from tests.conftest import Eventually

MODEL = "smollm2"
QUEUE = Queue(Capability.CHAT, Lane.DEFAULT, MODEL)


class CountingBus(MemoryGatewayBus):
    """Counts how often the queues are measured."""

    measured = 0

    async def queue_depths(self) -> Any:
        self.measured += 1
        return await super().queue_depths()


class Desk:
    """One gateway's overview, on a system in memory."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.bus = CountingBus(self.broker)
        self.registry, self.store = MemoryRegistry(MemoryHub()), MemoryStore()
        metrics = GatewayMetrics()
        self.traffic = TrafficExchange(self.bus, metrics.model_totals)
        dispatcher = Dispatcher(self.bus, self.registry, metrics, Limits())
        readiness = ReadinessCheck(self.bus, self.registry, self.store, ShutdownState())
        self.monitor = OverviewMonitor(OverviewSources(self.bus, dispatcher, self.store, self.traffic, readiness.check))

    async def start(self) -> None:
        await self.registry.start()
        offer = ModelOffer(name=MODEL, capabilities=(Capability.CHAT,))
        self.worker = await self.registry.announce(
            WorkerPresence(id="w", backend="echo", host="here", models=(offer,), slots=2)
        )
        await self.traffic.start()

    async def close(self) -> None:
        await self.monitor.close()
        await self.traffic.close()
        await self.registry.close()

    def store_job(self, number: int) -> None:
        self.broker.store(QUEUE, b"{}\n", f"job_{number}.1", "alice")


@pytest.fixture
async def desk(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    monkeypatch.setattr(monitor_module, "INTERVAL_S", 0.05)
    monkeypatch.setattr(monitor_module, "LINGER_S", 0.2)
    desk = Desk()
    await desk.start()
    yield desk
    await desk.close()


def data_of(event: bytes) -> tuple[str, dict[str, Any]]:
    kind, data = event.decode().rstrip().split("\n")
    return kind.removeprefix("event: "), orjson.loads(data.removeprefix("data: "))


async def test_the_first_event_is_the_whole_and_the_next_only_what_changed(desk: Desk) -> None:
    """A row that stays as it is costs nothing; a model that goes away is removed by name."""
    async with aclosing(desk.monitor.follow()) as events:
        kind, whole = data_of(await anext(events))
        assert kind == "overview"
        assert [row["model"] for row in whole["models"]] == [MODEL]
        assert whole["attention"] == []
        assert whole["stale_since"] is None
        desk.store_job(1)
        changed = await _until(events, lambda data: data["models"])
        assert changed["models"][0]["waiting"]["default"] == 1
        assert changed["models"][0]["oldest_queued_at"] > 0
        await desk.worker.withdraw()
        desk.broker.delete_job(1)
        assert (await _until(events, lambda data: "removed" in data))["removed"] == [MODEL]


async def test_all_followers_get_the_same_bytes_of_one_computation(desk: Desk) -> None:
    """Fifty open tabs cost as much as one, but for writing."""
    followers = [desk.monitor.follow() for _ in range(50)]
    first = await asyncio.gather(*map(anext, followers))
    assert len({id(event) for event in first}) == 1
    before = desk.bus.measured
    second = await asyncio.gather(*map(anext, followers))
    assert len({id(event) for event in second}) == 1
    assert desk.bus.measured - before <= 2
    for follower in followers:
        await follower.aclose()


async def test_a_follower_that_missed_an_event_gets_the_whole_again(desk: Desk) -> None:
    """Changes alone would leave it with an overview that never was."""
    async with aclosing(desk.monitor.follow()) as slow, aclosing(desk.monitor.follow()) as quick:
        await anext(slow)
        for _ in range(4):
            await anext(quick)
        assert data_of(await anext(slow))[0] == "overview"
        assert data_of(await anext(quick))[0] == "changes"


async def test_without_nats_the_last_rows_stay_and_are_marked_stale(desk: Desk) -> None:
    """The frame says since when, and what to do; all is well again after the outage."""
    desk.store_job(1)
    async with aclosing(desk.monitor.follow()) as events:
        await anext(events)
        desk.broker.available = False
        stale = await _until(events, lambda data: data["stale_since"])
        assert stale["attention"][0]["subject"] == "nats"
        frame = await desk.monitor.read()
        assert frame["models"][0]["waiting"]["default"] == 1
        desk.broker.available = True
        back = await _until(events, lambda data: data["stale_since"] is None)
        assert not any(item["subject"] == "nats" for item in back.get("attention", []))


async def test_nothing_is_computed_while_nobody_follows(desk: Desk, eventually: Eventually) -> None:
    """A single reading computes for a moment, in case its reader comes back."""
    assert (await desk.monitor.read())["models"]
    await eventually(lambda: desk.monitor._task is None)
    measured = desk.bus.measured
    for _ in range(20):
        await asyncio.sleep(0)
    assert desk.bus.measured == measured
    assert desk.traffic.follows is False


async def _until(events: AsyncIterator[bytes], holds: Any) -> dict[str, Any]:
    """Return the data of the first event for which this holds."""
    async for event in events:
        if holds(data := data_of(event)[1]):
            return data
    raise AssertionError("the stream ended")
