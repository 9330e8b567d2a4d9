"""A waiting job changes its lane, and runs once."""

from __future__ import annotations

import pytest

from gateway.jobs.api import JobNotWaiting
from schemas.errors import Unavailable
from schemas.jobs import JobStatus, Lane
from tests.unit.gateway.jobs.rig import OWNER, Rig


async def test_the_job_waits_in_its_new_lane_and_runs_once(rig: Rig) -> None:
    """Record, queue and outcome agree."""
    job = await rig.submit()
    before = await rig.jobs.get(OWNER, job)
    moved = await rig.jobs.change_lane(OWNER, job, Lane.PRIORITY)
    assert (before.lane, moved.lane, moved.status) == (Lane.DEFAULT, Lane.PRIORITY, JobStatus.QUEUED)
    assert [one.queue.lane for one in rig.broker.jobs.values()] == [Lane.PRIORITY]
    assert await rig.jobs.change_lane(OWNER, job, Lane.PRIORITY) == moved
    await rig.jobs.change_lane(OWNER, job, Lane.DEFAULT)
    await rig.jobs.change_lane(OWNER, job, Lane.FLEX)
    assert (await rig.jobs.estimate(await rig.jobs.get(OWNER, job)))[0] == 0
    await rig.worker()
    record = await rig.ended(job)
    assert (record.status, record.lane, record.attempts) == (JobStatus.COMPLETED, Lane.FLEX, 1)
    assert rig.ran == [job]


async def test_a_gateway_that_dies_in_between_leaves_one_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both messages are there then; repeated, the change stores no third."""

    async def dies(*_: object) -> None:
        raise Unavailable("gone")

    job = await rig.submit()
    log = rig.gateways[0].jobs._lanes._log
    with monkeypatch.context() as patch:
        patch.setattr(log, "delete_job", dies)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await rig.jobs.change_lane(OWNER, job, Lane.PRIORITY)
            await rig.store.update(OWNER, job, lane=Lane.DEFAULT, seq=min(rig.broker.jobs))
    assert len(rig.broker.jobs) == 2
    await rig.worker()
    assert (await rig.ended(job)).status is JobStatus.COMPLETED
    await rig.eventually(lambda: not rig.broker.jobs)
    assert rig.ran == [job]


async def test_only_a_waiting_job_changes_its_lane(rig: Rig) -> None:
    """One that runs, or has ended, stays as it is."""
    rig.gate.clear()
    job = await rig.submit()
    await rig.worker()
    await rig.eventually(lambda: rig.running == 1)
    with pytest.raises(JobNotWaiting):
        await rig.jobs.change_lane(OWNER, job, Lane.FLEX)
    rig.gate.set()
    assert (await rig.ended(job)).lane is Lane.DEFAULT
    with pytest.raises(JobNotWaiting):
        await rig.jobs.change_lane(OWNER, job, Lane.FLEX)
    assert rig.ran == [job]
