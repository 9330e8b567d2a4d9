"""The answers of a worker's probes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from http.client import HTTPConnection
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from schemas.presence import WorkerState
from tests.conftest import Eventually
from tests.unit.workers.test_worker import Rig
from workers import health_server

Asked = tuple[int, str]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    made.backend.go.set()
    made.worker.drain()
    if made.life is not None:
        await made.life
        await made.submitter.close()
        await made.dispatcher.close()


class Side:
    """The worker's HTTP server for probes."""

    def __init__(self, rig: Rig) -> None:
        self.registry = CollectorRegistry()
        self.server = health_server.serve_probes(
            "127.0.0.1", 0, self.registry, lambda: rig.worker.state, lambda: rig.worker.problems
        )

    async def get(self, path: str) -> Asked:
        return await asyncio.to_thread(self.get_now, path)

    def get_now(self, path: str) -> Asked:
        status, answer = self.ask(path)
        return status, answer["status"]

    def read(self, path: str) -> dict[str, Any]:
        return self.ask(path)[1]

    def ask(self, path: str) -> tuple[int, dict[str, Any]]:
        connection = HTTPConnection("127.0.0.1", self.server.server_port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


@pytest.fixture
async def side(rig: Rig) -> AsyncIterator[Side]:
    made = Side(rig)
    yield made
    await asyncio.to_thread(made.server.shutdown)
    made.server.server_close()


async def test_ready_from_its_first_job_to_its_last(rig: Rig, side: Side, eventually: Eventually) -> None:
    """Before it takes jobs, while its backend is down and while it drains, a worker is healthy but not ready."""
    assert await side.get("/readyz") == (503, "starting")
    await rig.start()
    await eventually(lambda: rig.state() is WorkerState.READY)
    assert await side.get("/readyz") == (200, "ready")
    rig.backend.up = False
    await eventually(lambda: rig.state() is WorkerState.UNHEALTHY)
    assert await side.get("/readyz") == (503, "unhealthy")
    rig.backend.up = True
    await eventually(lambda: rig.state() is WorkerState.READY)
    assert await side.get("/readyz") == (200, "ready")
    rig.worker.drain()
    assert await side.get("/readyz") == (503, "draining")
    assert await side.get("/health") == (200, "ok")


async def test_a_stuck_worker_is_not_healthy(rig: Rig, side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event loop that does not run cannot send heartbeats either: the process must be restarted."""
    monkeypatch.setattr(health_server, "LOOP_TIMEOUT_S", 0.05)
    asked = asyncio.get_running_loop().run_in_executor(None, side.get_now, "/health")
    time.sleep(0.5)
    assert await asked == (503, "stuck")
    monkeypatch.undo()
    assert await side.get("/health") == (200, "ok")


async def test_readiness_says_what_is_wrong(rig: Rig, side: Side, eventually: Eventually) -> None:
    """The answer holds the problems as sentences, beside the state."""
    rig.backend.up = False
    await rig.start()
    await eventually(lambda: rig.state() is WorkerState.UNHEALTHY)
    assert await side.get("/readyz") == (503, "unhealthy")
    assert await asyncio.to_thread(side.read, "/readyz") == {"status": "unhealthy", "problems": ["down"]}
    assert await asyncio.to_thread(side.read, "/health") == {"status": "ok"}
    rig.backend.up = True
    await eventually(lambda: rig.worker.state == "ready")
    assert await asyncio.to_thread(side.read, "/readyz") == {"status": "ready"}
