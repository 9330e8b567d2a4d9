"""deploy/service-template: copied, tested, started, entered, called through a gateway, and moved."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.embedded.managed_process import ManagedProcess
from tests.cluster import KEY, ROOT, Cluster, chat, free_port, texts
from tests.conftest import Eventually
from tests.fork_server import forked

TEMPLATE = ROOT / "deploy" / "service-template"
SETTINGS: dict[str, Any] = {"WORKER_HEALTH_INTERVAL_S": "1", "WORKER_LEASE_S": "2"}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TEMPLATE, tmp_path / "my-service", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path, **SETTINGS) as cluster:
        await cluster.start_gateway()
        await cluster.start_worker("service", name="services")
        yield cluster


async def ended(folder: Path, *command: str, **settings: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=os.environ | settings,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


async def started(folder: Path, http: httpx.AsyncClient) -> tuple[ManagedProcess, str]:
    """The service as its Dockerfile runs it, but for its port; ready."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    async def ready() -> bool:
        try:
            return (await http.get(f"{url}/readyz")).status_code == 200
        except httpx.HTTPError:
            return False

    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(folder), "--port", str(port)]
    process = ManagedProcess(
        f"service-{port}", command, log_file=folder / f"{port}.log", env=dict(os.environ), ready=ready
    )
    await process.start()
    return process, url


async def test_its_own_test_passes_where_it_was_copied_to(copied: Path) -> None:
    """It needs nothing of the repository."""
    code, out = await ended(copied, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert code == 0, out


async def test_it_serves_through_the_gateway_and_moves(copied: Path, cluster: Cluster, eventually: Eventually) -> None:
    """Entered by one command, called by its model's name; then on another port, by the same command."""
    async with httpx.AsyncClient() as http:
        here, url = await started(copied, http)
        await enter(cluster, url)
        await eventually(lambda: answers(cluster))
        lines = [line async for line in cluster.stream(chat("hello there", model="upside-down"))]
        assert ("".join(texts(lines)), lines[-1]) == ("olleh ereht ", "[DONE]")
        there, url = await started(copied, http)
        await enter(cluster, url)
        await here.stop()
        await eventually(lambda: answers(cluster))
        assert "POST /v1/chat/completions" in there.tail(50)
        await there.stop()


async def test_what_it_refuses_reaches_the_caller(copied: Path, cluster: Cluster, eventually: Eventually) -> None:
    """In its own words, as a 400."""
    async with httpx.AsyncClient() as http:
        service, url = await started(copied, http)
        await enter(cluster, url)
        await eventually(lambda: answers(cluster))
        answer = await cluster.post("/v1/chat/completions", chat(" ", model="upside-down", stream=True))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert answer.json()["error"]["message"] == "there is nothing to say backwards"
        await service.stop()


async def enter(cluster: Cluster, url: str) -> None:
    """By the console, as the README says."""
    command = ("services", "add", "upside-down", url, "--url", cluster.url)
    code, out = await ended(ROOT, *forked("cli.main"), *command, NEXUS_API_KEY=KEY)
    assert (code, out) == (0, f"upside-down: {url}\n")


async def answers(cluster: Cluster) -> bool:
    answer = await cluster.post("/v1/chat/completions", chat("hello", model="upside-down"))
    return answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"].strip() == "olleh"
