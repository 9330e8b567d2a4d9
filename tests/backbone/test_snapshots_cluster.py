"""Streams of one server restored into three that hold them together, and back."""

from __future__ import annotations

import asyncio
import contextlib

from backbone.bus.job_log import JobLog, Retention
from backbone.bus.subjects import OUTCOMES_STREAM
from schemas.errors import Unavailable
from tests.backbone.job_logs import MIB, World, new_job, outcome_of
from tests.backbone.test_job_log_cluster import three_nats
from tests.backbone.test_snapshots import bring, snapshots, take, words_of
from tests.conftest import Eventually
from tests.servers import Server

__all__ = ["three_nats"]

ONE = Retention(max_event_bytes=256 * MIB, max_outcome_bytes=64 * MIB, max_dead_letter_bytes=64 * MIB)
THREE = Retention(max_event_bytes=256 * MIB, max_outcome_bytes=64 * MIB, max_dead_letter_bytes=64 * MIB, replicas=3)


async def test_one_replica_becomes_three_and_one_again(
    own_nats: Server,
    three_nats: list[Server],
    eventually: Eventually,
) -> None:
    """Words, what is recorded of them, and the consumer that says so survive both ways, and a server's death in between."""
    jobs = [new_job() for _ in range(40)]
    world = World(own_nats.url, ONE)
    log = await world.gateway()
    for job in jobs[:20]:
        await log.store_outcome(outcome_of(job), job.encode())
    recorded = await words_of(log, 20)
    for job in jobs[20:]:
        await log.store_outcome(outcome_of(job), job.encode())
    found = await take(own_nats.url, OUTCOMES_STREAM)
    await world.close()

    urls = ",".join(server.url for server in three_nats)

    async def brought() -> bool:
        with contextlib.suppress(Unavailable):  # the servers have not found each other yet
            await bring(urls, found, num_replicas=3)
            return True
        return False

    await eventually(brought, timeout_s=40)
    world = World(urls, THREE)
    log = await gateway(world)
    again = await words_of(log, 10)
    assert not again & recorded
    found = await take(urls, OUTCOMES_STREAM)
    await world.close()
    three_nats[0].kill()
    await three_nats[0].process.wait()

    fresh = World(urls, THREE)
    stored_outcome = await (await gateway(fresh)).read_outcome(jobs[39])
    assert stored_outcome is not None
    assert stored_outcome.payload == jobs[39].encode()
    await fresh.close()

    async with snapshots(own_nats.url) as there:
        await there.delete(OUTCOMES_STREAM)
    await bring(own_nats.url, found, num_replicas=1)
    world = World(own_nats.url, ONE)
    log = await world.gateway()
    assert not await words_of(log, 10) & recorded
    await world.close()


async def gateway(world: World) -> JobLog:
    """Once the servers have agreed on who leads."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(Unavailable):
                return await world.gateway()
