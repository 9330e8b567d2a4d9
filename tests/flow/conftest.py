"""Fixtures of the flow tests: clusters of real processes that live as long as a module, crews as long as a test."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.cluster import Cluster, Crew

SETTINGS = {"ACK_WAIT_S": "2", "WORKER_LEASE_S": "2", "WORKER_HEALTH_INTERVAL_S": "1"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Servers and one gateway, with a short `ack_wait`. A test that breaks a part mends it."""
    async with Cluster(tmp_path_factory.mktemp("cluster"), **SETTINGS) as cluster:
        await cluster.start_gateway()
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def crew(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncIterator[Crew]:
    """Workers of the test's own, for a model of its own."""
    crew = Crew(cluster, re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-"))
    try:
        yield crew
    finally:
        await crew.stop()
