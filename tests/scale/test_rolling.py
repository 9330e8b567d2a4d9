"""Everything is restarted while everything is asked for, and nobody notices."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster import Cluster
from tests.scale.balancer import LoadBalancer
from tests.scale.load import Load
from tests.servers import Process
from tests.soak.faults import mended

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKERS = ("north", "south")


async def test_rolling_restart(cluster: Cluster, balancer: LoadBalancer) -> None:
    """All gateways and all workers are restarted one after the other under load: no request fails, streams and uploads included."""
    for name in WORKERS:
        await cluster.start_worker("echo", name=name)
    load = Load(balancer.url)
    try:
        load.start(sync=4, stream=4, large=1, upload=1, submit=4)
        await asyncio.gather(restart_gateways(cluster, load), restart_workers(cluster, balancer))
        await load.stop()
    finally:
        await load.aclose()
    assert load.failed == []
    assert min(load.done[kind] for kind in ("sync", "stream", "large", "upload", "submit", "resume")) > 1
    assert load.resumed, "no stream outlasted a gateway's drain"


async def restart_gateways(cluster: Cluster, load: Load) -> None:
    for gateway in cluster.gateways:
        # Some of them on this one, which will not wait for their end.
        await load.begin_streams(4)
        await restart(gateway)


async def restart_workers(cluster: Cluster, balancer: LoadBalancer) -> None:
    for name in WORKERS:
        await restart(cluster.workers[name])
        await ready(cluster, balancer, name)


async def restart(process: Process) -> None:
    """As anyone who supervises it does: SIGTERM, time to end, and the next one."""
    assert await process.stop(grace_s=40) == 0
    await mended(process.start)


async def ready(cluster: Cluster, balancer: LoadBalancer, name: str) -> None:
    """Until a gateway says that the worker is there again."""
    async with asyncio.timeout(30):
        while True:
            workers = (await cluster.http.get(balancer.url + "/v1/workers")).json()["data"]
            if {worker["id"]: worker["state"] for worker in workers}.get(name) == "ready":
                return
            await asyncio.sleep(0.1)
