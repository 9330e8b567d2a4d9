"""Holding the waiting jobs of a model."""

from __future__ import annotations

import pytest

from gateway.queue_holds import QueueHolds
from schemas.errors import Unavailable
from schemas.jobs import JobStatus
from tests.unit.gateway.jobs.conftest import rig
from tests.unit.gateway.jobs.rig import OWNER, QUEUE_S, Rig

__all__ = ["rig"]


async def test_held_jobs_neither_run_nor_expire_and_run_once_released(rig: Rig) -> None:
    """The limit on waiting begins again for a job that reaches it meanwhile; after the release it counts."""
    gateway = rig.gateways[0]
    holds = QueueHolds(gateway.dispatcher.bus, gateway.registry)
    await rig.worker()
    hold = await holds.hold("echo", "maintenance")
    assert (holds.get("echo"), hold.reason) == (hold, "maintenance")
    job = await rig.submit()
    for _ in range(3):
        rig.clock.ahead += QUEUE_S + 1
        for due in await rig.store.claim_due(10):
            await gateway.expiry_watcher._check(due)
    assert await rig.status(job) is JobStatus.QUEUED
    assert await rig.jobs.estimate(await rig.jobs.get(OWNER, job)) == (0, None)
    assert rig.ran == []
    assert (await holds.hold("echo", "longer")).since == hold.since
    assert await holds.release("echo") is True
    assert (await rig.ended(job)).status is JobStatus.COMPLETED
    assert await holds.release("echo") is False


async def test_a_gateway_applies_what_another_one_has_set(rig: Rig) -> None:
    """The one that was asked may die before NATS knows."""
    gateway = rig.gateways[0]
    holds = QueueHolds(gateway.dispatcher.bus, gateway.registry)
    await holds.start()
    try:
        await gateway.registry.put_hold(await QueueHolds(gateway.dispatcher.bus, gateway.registry).hold("echo", ""))
        await rig.eventually(lambda: rig.broker.is_held("echo"))
        await gateway.registry.remove_hold("echo")
        await rig.eventually(lambda: not rig.broker.is_held("echo"))
    finally:
        await holds.close()


async def test_nothing_is_held_that_cannot_be_stored(rig: Rig) -> None:
    """Without the registry no gateway could see it after a restart."""
    gateway = rig.gateways[0]
    holds = QueueHolds(gateway.dispatcher.bus, gateway.registry)
    rig.hub.available = False
    with pytest.raises(Unavailable):
        await holds.hold("echo", "")
    assert not rig.broker.is_held("echo")
    rig.hub.available = True
