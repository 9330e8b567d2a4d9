"""Anyone who reads the OpenAPI document meets the gateway that it describes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.clients.openapi_fuzz import fuzz, start
from tests.cluster import Cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with Cluster(Path(tmp_path_factory.mktemp("contract"))) as cluster:
        await start(cluster)
        yield cluster


@pytest.mark.timeout(600)
async def test_the_gateway_keeps_to_its_document(cluster: Cluster) -> None:
    """No answer to valid, invalid or half valid requests is an error of the server's or one that the document does not name: status,
    content type, headers, schema; what is wrong is refused, what is right is taken, keys are looked at, other methods are 405.
    """
    code, output = await fuzz(cluster, "--max-examples", "2", "--generation-deterministic", "--seed", "1")
    assert code == 0, output[output.find("= FAILURES =") :][:20_000]
    assert "Tested: " in output
