"""A worker whose adapter comes from an installed package: the example in docs/how-to/adapters.md, asked through a gateway."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.backends.test_entry_points import MODULE, PROJECT, TEST, install
from tests.cluster import ROOT, Cluster, chat
from tests.servers import source

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_worker_serves_by_an_adapter_that_a_package_brings(cluster: Cluster, tmp_path: Path) -> None:
    """Nothing in Nexus knows of it."""
    if not source().processes:
        pytest.skip("the package is installed on this machine, not in the worker's image")
    install(tmp_path, "nexus-teller", PROJECT["project"]["entry-points"]["nexus.backends"], nexus_teller=MODULE)
    example: dict[str, Any] = {}
    exec(compile(TEST, "docs/how-to/adapters.md", "exec"), example)
    async with asynccontextmanager(example["double"].__wrapped__)() as double:
        path = os.pathsep.join((str(ROOT), str(tmp_path)))
        await cluster.start_worker(
            "teller", name="teller", PYTHONPATH=path, WORKER_BACKEND_URL=f"http://127.0.0.1:{double.port}"
        )
        answer = await cluster.post("/v1/chat/completions", chat("a story", model="story"))
        assert answer.json()["choices"][0]["message"]["content"] == "Once upon a time "
        await cluster.stop_workers("teller")
