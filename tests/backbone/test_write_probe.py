"""A gateway proves that NATS stores: on a real server, whose writes fail as on a full disk."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator

import pytest

from backbone.bus.nats import write_probe as module
from backbone.bus.nats.gateway_bus import NatsGatewayBus
from backbone.bus.nats.jetstream import JobsStreamConfig
from backbone.bus.nats.job_log import NatsJobLog
from backbone.bus.nats.write_probe import StorageHealth
from schemas.errors import Unavailable
from tests.backbone.job_logs import SMALL, new_job, outcome_of
from tests.conftest import Eventually
from tests.servers import Server, Source


@pytest.fixture
async def bus(own_nats: Server, storage_health: StorageHealth) -> AsyncIterator[NatsGatewayBus]:
    stream = JobsStreamConfig(max_jobs=100, max_bytes=64 * 1024 * 1024)
    bus = NatsGatewayBus(own_nats.url, gateway="proof", ack_wait_s=5.0, stream=stream, storage_health=storage_health)
    await bus.start()
    yield bus
    await bus.close()


@pytest.fixture
def storage_health() -> StorageHealth:
    return StorageHealth()


@pytest.fixture
async def log(own_nats: Server, storage_health: StorageHealth, bus: NatsGatewayBus) -> AsyncIterator[NatsJobLog]:
    """Its proof runs as soon as somebody doubts."""
    log = NatsJobLog(own_nats.url, "proof", retention=SMALL, storage_health=storage_health)
    await log.start()
    yield log
    await log.close()


async def test_a_doubted_queue_proves_itself_and_stays_empty(
    log: NatsJobLog, bus: NatsGatewayBus, storage_health: StorageHealth, eventually: Eventually
) -> None:
    """A job that was neither stored nor refused may have met a stream without a leader: nothing is refused for it."""
    storage_health.report_doubt()
    await eventually(lambda: not storage_health.doubted)
    storage_health.require_available()

    async def empty() -> bool:
        return await bus.queue_depths() == []

    await eventually(empty)
    assert await log.store_outcome(outcome_of(new_job()))


async def test_what_a_slow_disk_stored_too_late_is_removed(
    log: NatsJobLog, bus: NatsGatewayBus, storage_health: StorageHealth, eventually: Eventually
) -> None:
    """A proof that was not confirmed in time may have been stored all the same; nobody else would ever remove it."""
    bus._connection.publish(module.JOBS_PROBE_SUBJECT, module.PAYLOAD)

    async def holds(count: int) -> bool:
        return sum(depth.waiting for depth in await bus.queue_depths()) == count

    await eventually(lambda: holds(1))
    storage_health.report_doubt()
    await eventually(lambda: holds(0))


async def test_writes_that_fail_are_refused_at_once(
    log: NatsJobLog, own_nats: Server, servers: Source, storage_health: StorageHealth, eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Once the proofs have failed for a while; after a restart of the server with room, they succeed again."""
    if not servers.processes:
        pytest.skip("the limit is set on a process of this machine")
    monkeypatch.setattr(module, "FAILURE_GRACE_S", 0.5)
    assert own_nats.process.pid is not None
    resource.prlimit(own_nats.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    async def refused() -> bool:
        storage_health.changed.set()  # prove now
        await asyncio.sleep(0.1)
        return bool(storage_health.problem)

    await eventually(refused)
    began = asyncio.get_running_loop().time()
    with pytest.raises(Unavailable, match="restart nats-server"):
        await log.store_outcome(outcome_of(new_job()))
    assert asyncio.get_running_loop().time() - began < 1.0
    assert await log.read_outcome(new_job()) is None  # what is there can be read
    await own_nats.restart()
    await eventually(lambda: not storage_health.problem)
    assert await log.store_outcome(outcome_of(new_job()))
