"""A cluster of containers, whatever `--servers` says; skipped, and said why, where no engine answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.cluster import Cluster
from tests.containers.engine import require_engine
from tests.containers.source import ContainerSource
from tests.crews import crew
from tests.faults.conftest import SETTINGS
from tests.servers import source

__all__ = ["crew"]


@pytest.fixture(scope="session")
def container_source() -> Iterator[ContainerSource]:
    chosen = source()
    if isinstance(chosen, ContainerSource):
        yield chosen
        return
    require_engine()
    made = ContainerSource()
    try:
        yield made
    finally:
        made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    tmp_path_factory: pytest.TempPathFactory, container_source: ContainerSource
) -> AsyncIterator[Cluster]:
    """Servers and two gateways. A test that breaks a part mends it."""
    async with Cluster(tmp_path_factory.mktemp("cluster"), source=container_source, **SETTINGS) as cluster:
        await cluster.start_gateway()
        await cluster.start_gateway()
        yield cluster
