"""The secured Nexus that the tests of one file share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.deploy.secured import World, secured_world


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with secured_world(tmp_path_factory.mktemp("production")) as world:
        yield world
