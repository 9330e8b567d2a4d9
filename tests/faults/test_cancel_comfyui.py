"""Cancelled jobs of a ComfyUI, with heartbeats as far apart as in production: it is told within two seconds, wherever the job is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import pytest
import pytest_asyncio

from tests.backends.doubles.comfyui import ComfyDouble
from tests.cluster import Cluster, Crew
from tests.conftest import Eventually
from tests.faults.test_callers import STOP_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def cluster_settings() -> dict[str, str]:
    return {"ACK_WAIT_S": "15"}


@pytest_asyncio.fixture(loop_scope="module")
async def double() -> AsyncIterator[ComfyDouble]:
    async with ComfyDouble() as server:
        yield server


class Picture:
    """A request for a picture that takes long, as a job or by a caller who waits."""

    def __init__(self, crew: Crew, cluster: Cluster) -> None:
        self.body = {"model": crew.model, "prompt": "a cat", "size": "16x16", "steps": 1000}
        self._cluster = cluster
        self._job = ""
        self._caller: asyncio.Task[Any] | None = None

    async def ask(self, how: str) -> None:
        if how == "job":
            answer = await self._cluster.post("/v1/jobs", {"endpoint": PATH, "body": self.body})
            self._job = json.loads(answer.text)["id"]
        else:
            self._caller = asyncio.create_task(self._cluster.post(PATH, self.body))

    async def cancel(self) -> None:
        if self._caller is None:
            answer = await self._cluster.post(f"/v1/jobs/{self._job}/cancel", None)
            assert json.loads(answer.text)["status"] == "cancelled"
        else:
            self._caller.cancel()
            await asyncio.gather(self._caller, return_exceptions=True)


async def stopped_within(event: asyncio.Event, since: float) -> None:
    async with asyncio.timeout(max(0.0, since + STOP_S - monotonic())):
        await event.wait()


OLD, NEW = "0.3.40", "0.3.75"
"""An interrupt of the old one ends whatever runs."""


@pytest.mark.parametrize(
    ("how", "state", "version"),
    [
        ("job", "executing", NEW),
        ("job", "busy", NEW),
        ("caller", "busy", OLD),
        ("job", "between", OLD),
        ("job", "deaf", OLD),
        ("caller", "queued", NEW),
        ("job", "queued", OLD),
        ("caller", "taking", NEW),
        ("job", "showing", NEW),
    ],
)
async def test_cancelled(
    how: str, state: str, version: str, crew: Crew, cluster: Cluster, double: ComfyDouble, eventually: Eventually
) -> None:
    """`busy`: the server takes seconds to say how its queue is. `between`: it loads a model. `deaf`: without a websocket."""
    double.checkpoints, double.version = [crew.model], version
    behavior: dict[str, dict[str, Any]] = {
        "executing": {"step_s": 0.05},
        "busy": {"step_s": 0.05, "answer_s": 4.0},
        "between": {"load_s": 3.0},
        "deaf": {"step_s": 0.05, "no_sockets": True},
        "queued": {"step_s": 0.05},
        "taking": {"step_s": 0.05, "never_takes": True},
        "showing": {"never_shows": True},
    }
    double.behave(**behavior[state])
    await crew.start(backend="comfyui", WORKER_BACKEND_URL=double.url)
    work = Picture(crew, cluster)
    if state == "queued":
        double.enqueue_another()
    await work.ask(how)
    told = double.stopped
    if state == "queued":
        await eventually(lambda: double.running is not None and len(double.queue) == 1)
    elif state == "taking":
        await asyncio.wait_for(double.taking.wait(), 30)
    elif state == "showing":
        told = double.left
        await asyncio.wait_for(double.showing.wait(), 30)
    else:
        await eventually(lambda: double.running is not None)
        if state != "between":
            await eventually(lambda: double.steps_made > 3)
    told.clear()
    began = monotonic()
    await work.cancel()
    if state == "taking":
        double.hold.set()
    await stopped_within(told, began)
    double.behave(step_s=0.01)
    double.end_another()
    await eventually(double.idle)
