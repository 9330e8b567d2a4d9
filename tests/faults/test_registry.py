"""etcd and Redis die, freeze, forget: synchronous requests go on."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.cluster import Cluster, Crew, Recorded
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

LEASE_S = 2.0


@asynccontextmanager
async def asking(crew: Crew) -> AsyncIterator[list[Recorded]]:
    """Ask all the time; afterwards every request must have been answered."""
    answers: list[Recorded] = []

    async def ask() -> None:
        while True:
            answers.append(crew.ask())
            answers.append(crew.stream())
            await asyncio.sleep(0.05)

    task = asyncio.create_task(ask())
    try:
        yield answers
    finally:
        task.cancel()
    for answer in answers:
        await answer.end()
        assert answer.status == 200, answer.body
        assert answer.complete if answer.lines else answer.text == "hello there"
        assert answer.seconds < 15


async def readiness(cluster: Cluster) -> tuple[int, str, set[str]]:
    """Status, word, and the parts that are not well."""
    response = await cluster.get("/readyz")
    answer = response.json()
    return response.status_code, answer["status"], {name for name, part in answer["parts"].items() if not part["ok"]}


async def reads(cluster: Cluster, *wanted: object) -> bool:
    return await readiness(cluster) == wanted


async def test_etcd_stopped_for_longer_than_its_leases(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """etcd is away for longer than its leases live: requests work throughout, and workers are listed when it is back."""
    names = await crew.start_all("", "")
    async with asking(crew) as answers:
        await eventually(lambda: len(answers) > 4)
        await cluster.etcd.stop()
        await eventually(lambda: reads(cluster, 200, "degraded", {"etcd"}))
        await asyncio.sleep(LEASE_S + 1)  # the outage is the fault
        assert set(names) <= set(await cluster.listed())
        await cluster.etcd.restart()
        await eventually(lambda: reads(cluster, 200, "ready", set()))
        await eventually(lambda: in_etcd(cluster, names), what="the workers have announced themselves again")
    assert set(names) <= set(await cluster.listed())
    # The registry works, both ways: a new worker appears, a killed one vanishes.
    third = await crew.start()
    crew.kill(third)
    await cluster.wait_for_worker(third, None)


async def in_etcd(cluster: Cluster, names: list[str]) -> bool:
    """Whether a gateway that knows nothing but etcd would know these workers."""
    wanted = {"key": b64(b"/nexus/workers/"), "range_end": b64(b"/nexus/workers0")}
    async with httpx.AsyncClient() as etcd:
        listing = (await etcd.post(f"{cluster.etcd.url}/v3/kv/range", json=wanted)).json()
    return {b64(f"/nexus/workers/{name}".encode()) for name in names} <= {
        entry["key"] for entry in listing.get("kvs", [])
    }


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def test_etcd_loses_its_data(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """etcd comes back empty: workers announce themselves again, and requests work throughout."""
    names = await crew.start_all("", "")
    async with asking(crew) as answers:
        await eventually(lambda: len(answers) > 4)
        await cluster.etcd.stop()
        await cluster.etcd.start()  # begins with nothing
        await eventually(lambda: in_etcd(cluster, names))
        assert set(names) <= set(await cluster.listed())
    fresh = await cluster.start_gateway()
    models = (await cluster.http.get(cluster.urls[-1] + "/v1/models")).json()["data"]
    assert crew.model in {model["id"] for model in models}
    await fresh.stop()


async def test_etcd_frozen(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """etcd freezes for longer than its leases live: requests work throughout."""
    names = await crew.start_all("")
    async with asking(crew):
        cluster.etcd.pause()
        await eventually(lambda: reads(cluster, 200, "degraded", {"etcd"}))
        await asyncio.sleep(LEASE_S + 1)  # the freeze is the fault
        cluster.etcd.resume()
        await eventually(lambda: reads(cluster, 200, "ready", set()))
        await eventually(lambda: in_etcd(cluster, names))
    assert set(names) <= set(await cluster.listed())


async def test_redis_frozen_and_killed(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """Redis freezes, dies and comes back: synchronous requests do not notice, readiness names it."""
    await crew.start()
    async with asking(crew):
        cluster.redis.pause()
        await eventually(lambda: reads(cluster, 200, "degraded", {"redis"}))
        cluster.redis.kill()
        await cluster.redis.process.wait()
        await eventually(lambda: reads(cluster, 200, "degraded", {"redis"}))
        await cluster.redis.restart()
        await eventually(lambda: reads(cluster, 200, "ready", set()))
