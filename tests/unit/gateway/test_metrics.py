"""The exposition of metrics: one rendering for concurrent scrapes, which does not block the event loop."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from gateway.cached_result import CachedResult
from gateway.metrics import FastHistogram, GatewayMetrics, MetricsExposition


async def test_the_text_equals_prometheus_clients() -> None:
    """Made metric by metric, it is what prometheus_client makes of all of them."""
    metrics = GatewayMetrics()
    for number in range(20):
        metrics.child(metrics.requests, "/v1/x", f"model-{number}", 200).inc()
        metrics.itl.observe(0.01, f"model-{number}")
    stable = [line for line in generate_latest(metrics.registry).splitlines() if not line.startswith(b"process_")]
    assert [
        line
        for line in (await MetricsExposition(metrics.registry).text()).splitlines()
        if not line.startswith(b"process_")
    ] == stable


async def test_rendering_does_not_block_the_loop() -> None:
    """No scrape keeps streams waiting for all of the text."""
    metrics, pipeline = GatewayMetrics(), 0
    making = asyncio.create_task(MetricsExposition(metrics.registry).text())
    while not making.done():
        pipeline += 1
        await asyncio.sleep(0)
    assert pipeline > len(list(metrics.registry.collect())) / 2


async def test_concurrent_scrapes_share_one_rendering() -> None:
    """However many ask at once or soon after, it is made once; later it is made again."""
    made, gate = 0, asyncio.Event()

    async def make() -> int:
        nonlocal made
        made += 1
        await gate.wait()
        return made

    shared = CachedResult(make, 60.0)
    asking = [asyncio.create_task(shared.get()) for _ in range(10)]
    await asyncio.sleep(0)
    asking[0].cancel()  # who goes away takes nothing from the others
    gate.set()
    assert await asyncio.gather(*asking[1:]) == [1] * 9
    assert await shared.get() == 1
    fresh = CachedResult(make, 0.0)
    assert (await fresh.get(), await fresh.get()) == (2, 3)


async def test_a_failure_is_not_cached() -> None:
    """After a failure the next one who asks has another try."""
    fail = True

    async def make() -> str:
        if fail:
            raise ValueError("no")
        return "text"

    shared = CachedResult(make, 60.0)
    with pytest.raises(ValueError, match="no"):
        await shared.get()
    fail = False
    assert await shared.get() == "text"


def test_a_fast_histogram_reads_as_prometheus_clients() -> None:
    """Both histograms have the same samples for the same observations, bounds included."""
    one, other = CollectorRegistry(), CollectorRegistry()
    bounds = (0.005, 1, 2.5)
    fast = FastHistogram("seconds", "Text.", bounds, one, ("endpoint", "model"))
    slow = Histogram("seconds", "Text.", ["endpoint", "model"], registry=other, buckets=bounds)
    for value in (0.001, 0.005, 0.0051, 1, 2, 3, 100):
        fast.observe(value, "/v1/x", "m")
        slow.labels("/v1/x", "m").observe(value)
    found, expected = (
        [
            (sample.name, sample.labels, sample.value)
            for metric in registry.collect()
            for sample in metric.samples
            if not sample.name.endswith("_created")
        ]
        for registry in (one, other)
    )
    assert sorted(found, key=str) == sorted(expected, key=str)
