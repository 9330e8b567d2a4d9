"""A worker whose adapter lacks a library, as a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.backends.doubles.comfyui import ComfyDouble
from tests.cluster import Cluster, Crew, free_port
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def double() -> AsyncIterator[ComfyDouble]:
    async with ComfyDouble() as server:
        yield server


async def test_a_worker_without_a_library_says_what_to_install_and_then_serves(
    cluster: Cluster, crew: Crew, double: ComfyDouble, tmp_path: Path, eventually: Eventually
) -> None:
    """Never `ready` with a 502 for each picture: not ready, with a command, in log, probe and registry; then ready by itself."""
    hidden = tmp_path / "aiohttp.py"
    hidden.write_text("raise ModuleNotFoundError(\"No module named 'aiohttp'\")")
    double.checkpoints = [crew.model]
    port = free_port()
    settings = {"PYTHONPATH": str(tmp_path), "WORKER_BACKEND_URL": double.url, "WORKER_OBSERVABILITY_PORT": str(port)}
    name = await crew.start(backend="comfyui", wait=False, WORKER_HEALTH_INTERVAL_S="0.2", **settings)
    await cluster.wait_for_worker(name, "unhealthy")
    [row] = [one for one in (await cluster.get("/v1/workers")).json()["data"] if one["id"] == name]
    [problem] = row["problems"]
    assert "The comfyui adapter cannot work yet. aiohttp cannot be imported" in problem
    assert "Install it with: " in problem
    assert "images" in problem
    probe = httpx.get(f"http://127.0.0.1:{port}/readyz")
    assert (probe.status_code, probe.json()) == (503, {"status": "unhealthy", "problems": [problem]})
    assert "aiohttp cannot be imported" in cluster.logs()
    answer = await cluster.post("/v1/images/generations", {"model": crew.model, "prompt": "a cat", "size": "64x64"})
    assert answer.status_code in (404, 503), answer.text

    hidden.unlink()
    await cluster.wait_for_worker(name)
    answer = await cluster.post("/v1/images/generations", {"model": crew.model, "prompt": "a cat", "size": "64x64"})
    assert answer.status_code == 200, answer.text
    assert httpx.get(f"http://127.0.0.1:{port}/readyz").json() == {"status": "ready"}
