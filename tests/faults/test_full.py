"""NATS's disk, or Redis's memory, is full: readiness says so, calls are refused at once, and it works again with room."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from tests.cluster import Cluster, chat
from tests.conftest import Eventually
from tests.crews import crew
from tests.faults.conftest import SETTINGS
from tests.servers import Source

__all__ = ["crew"]
pytestmark = pytest.mark.asyncio(loop_scope="module")

NOTICED_S = 20.0
"""A full disk is known to every gateway within this: a proof each 5 s, which has to fail for 5 s. The machine is shared."""
AT_ONCE_S = 2.0
REDIS_NOTICED_S = 5.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path_factory.mktemp("full"), **SETTINGS) as cluster:
        await cluster.start_gateway()
        yield cluster


async def unwell(cluster: Cluster) -> dict[str, str]:
    """The parts that readiness says are not well, and why."""
    parts = (await cluster.get("/readyz")).json()["parts"]
    return {name: part["error"] for name, part in parts.items() if not part["ok"]}


def job(model: str) -> dict[str, Any]:
    return {"endpoint": "/v1/chat/completions", "body": chat(model=model)}


async def test_the_disk_of_nats_is_full(cluster: Cluster, servers: Source, eventually: Eventually) -> None:
    """Readiness is 503 and names the part and what to do; every way in is refused at once; after room and a restart of
    nats-server, which does not recover by itself, all works again with no gateway restarted.
    """
    if not servers.processes:
        pytest.skip("the limit is set on a process of this machine")
    worker = await cluster.start_worker(WORKER_MODELS="full")
    gateway, nats = cluster.gateways[0].pid, cluster.nats.process.pid
    assert nats is not None
    # As a full disk: a write fails. The kernel has no other way to refuse one process alone.
    resource.prlimit(nats, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    async def noticed() -> bool:
        return "nats_write" in await unwell(cluster)

    await eventually(noticed, timeout_s=NOTICED_S)
    response = await cluster.get("/readyz")
    assert (response.status_code, response.json()["status"]) == (503, "unavailable")
    why = (await unwell(cluster))["nats_write"]
    assert "disk" in why
    assert "restart nats-server" in why
    loop = asyncio.get_running_loop()
    for path, body, headers in (
        ("/v1/jobs", job("full"), {}),
        ("/v1/chat/completions", chat(model="full"), {}),
        ("/v1/chat/completions", chat("x" * 700_000, model="full"), {}),
        ("/v1/chat/completions", chat(model="full"), {"idempotency-key": "one"}),
    ):
        began = loop.time()
        answer = await cluster.post(path, body, headers=headers)
        assert loop.time() - began < AT_ONCE_S
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert "NATS" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
    resource.prlimit(nats, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await cluster.nats.restart()

    async def works() -> bool:
        answers = [
            await cluster.get("/readyz"),
            await cluster.post("/v1/jobs", job("full")),
            await cluster.post("/v1/chat/completions", chat(model="full")),
        ]
        return all(answer.is_success for answer in answers)

    await eventually(works, timeout_s=NOTICED_S)
    assert cluster.gateways[0].pid == gateway
    await cluster.stop_workers(worker)


async def test_redis_is_out_of_memory(cluster: Cluster, eventually: Eventually) -> None:
    """`degraded`, with the part and what to do; submits are 503 that says so, chat goes on; with room all is well again."""
    worker = await cluster.start_worker(WORKER_MODELS="oom")
    redis = Redis.from_url(cluster.redis.url)
    try:
        await redis.config_set("maxmemory-policy", "noeviction")
        await redis.config_set("maxmemory", "1")

        async def noticed() -> bool:
            return "redis_write" in await unwell(cluster)

        await eventually(noticed, timeout_s=REDIS_NOTICED_S)
        response = await cluster.get("/readyz")
        assert (response.status_code, response.json()["status"]) == (200, "degraded")
        assert "maxmemory" in (await unwell(cluster))["redis_write"]
        refused = await cluster.post("/v1/jobs", job("oom"))
        assert refused.status_code == 503
        error = json.loads(refused.text)["error"]
        assert error["code"] == "unavailable"
        assert "memory" in error["message"]
        assert (await cluster.post("/v1/chat/completions", chat(model="oom"))).status_code == 200
    finally:
        await redis.config_set("maxmemory", "0")
        await redis.aclose()

    async def works() -> bool:
        ready = (await cluster.get("/readyz")).json()["status"] == "ready"
        return ready and (await cluster.post("/v1/jobs", job("oom"))).is_success

    await eventually(works, timeout_s=REDIS_NOTICED_S)
    await cluster.stop_workers(worker)
