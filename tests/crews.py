"""The fixtures of tests on a whole Nexus: a cluster and a crew that live as long as a module, a crew as long as a test.

A folder's conftest imports them and gives `cluster_settings`, the environment of its gateways and workers.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.cluster import Cluster, Crew


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory, cluster_settings: dict[str, Any]) -> AsyncIterator[Cluster]:
    """Servers and one gateway. A test that breaks a part mends it."""
    async with Cluster(tmp_path_factory.mktemp("cluster"), **cluster_settings) as cluster:
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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_crew(cluster: Cluster) -> AsyncIterator[Crew]:
    """One echo worker, for tests that leave it as it is."""
    crew = Crew(cluster, "shared")
    try:
        await crew.start()
        yield crew
    finally:
        await crew.stop()
