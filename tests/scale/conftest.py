"""Two gateways behind a real load balancer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.cluster import Cluster
from tests.scale.balancer import LoadBalancer
from tests.soak.faults import mended

SETTINGS: dict[str, Any] = {
    "ACK_WAIT_S": "3",
    "WORKER_LEASE_S": "3",
    "WORKER_HEALTH_INTERVAL_S": "1",
    "WORKER_CONCURRENCY": "16",
    "GATEWAY_LAME_DUCK_S": "5",  # the default
    "GATEWAY_DRAIN_S": "1",  # what is short has ended by then, since nothing new comes for most of the lame duck
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two gateways with the default lame duck, and no worker. A test that breaks a part mends it."""
    async with Cluster(tmp_path_factory.mktemp("scale"), **SETTINGS) as cluster:
        for _ in range(2):
            await mended(cluster.start_gateway)
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def balancer(cluster: Cluster) -> AsyncIterator[LoadBalancer]:
    balancer = LoadBalancer(cluster.folder, cluster.urls)
    await balancer.start()
    try:
        yield balancer
    finally:
        await balancer.stop()
