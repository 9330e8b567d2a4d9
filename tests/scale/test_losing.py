"""Any node of three may go, and what was accepted does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.scale.balancer import LoadBalancer
from tests.scale.losing import Loss, storm
from tests.scale.three import Three
from tests.soak.faults import mended


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Three]:
    async with Three(tmp_path) as cluster:
        for _ in range(2):
            await mended(cluster.start_gateway)
        await asyncio.gather(*(cluster.start_worker("echo") for _ in range(2)))
        yield cluster


@pytest.mark.timeout(240)
async def test_nodes_are_lost_under_load(three: Three) -> None:
    """Each NATS node and a member of etcd are killed or frozen, then two NATS nodes at once: what was accepted ends once, and well."""
    balancer = LoadBalancer(three.folder, three.urls)
    await balancer.start()
    losses = [
        Loss("nats", (0,), "kill", 1.0),
        Loss("nats", (1,), "freeze", 6.0),
        Loss("etcd", (0,), "kill", 1.0),
        Loss("nats", (0, 2), "kill", 2.0),
    ]
    try:
        wrong, load, _ = await storm(three, losses, balancer.url)
    finally:
        await balancer.stop()
    assert wrong == []
    assert len(load.accepted) > 10
    assert min(load.done[kind] for kind in ("sync", "stream", "submit", "resume")) > 1
