"""Jobs of teams that keep nothing: what is stored cannot be read, and is forgotten once it was delivered."""

from __future__ import annotations

import pytest

from gateway.jobs.api import EventsExpired, JobNotFailed
from gateway.jobs.attempts import count_attempts
from gateway.jobs.content_retention import UNFETCHED_RESULT_S
from schemas.errors import NotFound
from schemas.job_events import JobEventKind
from schemas.jobs import JobStatus
from tests.unit.gateway.jobs.rig import OWNER, Rig

MARKER = "what nobody may read"
SEALED = pytest.mark.parametrize("rig", [{"sealed": True}], indirect=True)
FAILING = {"echo": {"fail": "before", "fail_times": 3}}


def stored(rig: Rig) -> bytes:
    """Everything that the broker and the store of blobs hold, without keys."""
    log = rig.broker.job_log
    return b"".join(
        [
            *(job.message for job in rig.broker.jobs.values()),
            *(event.data for events in log.events.values() for event in events),
            *(one.outcome.encode(one.payload) for one in log.outcomes.values()),
            *(one.outcome.encode(one.message) for one in log.dead_letters),
            *(item.data for queue in log.work_queues.values() for item in queue.items),
        ]
    )


async def is_forgotten(rig: Rig, job: str) -> bool:
    return job not in rig.broker.job_log.content_keys


@SEALED
@pytest.mark.parametrize("stream", [False, True])
async def test_a_result_is_forgotten_once_it_was_delivered(rig: Rig, stream: bool) -> None:
    """Nothing can be read before either, but by its owner."""
    await rig.worker()
    rig.gate.clear()
    job = await rig.submit(MARKER, retain_none=True, stream=stream, metadata={"a": "b"})
    assert MARKER.encode() not in stored(rig)
    rig.gate.set()
    await rig.ended(job)
    events = await rig.events(job)
    assert [event.kind for event in events][-1] is JobEventKind.COMPLETED
    result = await rig.jobs.result(OWNER, job)
    for word in MARKER.split():
        assert word in result.data.decode()
        assert not stream or any(word.encode() in event.data for event in events)
    assert MARKER.encode() not in stored(rig)
    await rig.jobs.confirm_delivery(result.outcome)
    assert await is_forgotten(rig, job)
    with pytest.raises(NotFound) as caught:
        await rig.jobs.result(OWNER, job)
    assert caught.value.info.code == "result_expired"
    assert (await rig.jobs.get(OWNER, job)).status is JobStatus.COMPLETED
    assert (await count_attempts(rig.gateways[0].log, job, 1)).starts == 1
    if stream:
        with pytest.raises(EventsExpired):
            await rig.events(job)


@SEALED
async def test_large_content_is_removed(rig: Rig) -> None:
    """The blobs of the answer go with it."""
    await rig.worker()
    job = await rig.submit(MARKER * 40_000, retain_none=True)
    await rig.ended(job)
    result = await rig.jobs.result(OWNER, job)
    assert result.blob is not None
    assert result.blob.name.encode() not in stored(rig)
    await rig.jobs.confirm_delivery(result.outcome)
    assert await rig.blobs.info(result.blob.name) is None


@SEALED
async def test_a_failed_job_is_forgotten_at_once(rig: Rig) -> None:
    """Its error is kept without the server's words. It cannot be retried, nor its dead letter replayed."""
    await rig.worker()
    job = await rig.submit(MARKER, retain_none=True, **FAILING)
    record = await rig.ended(job)
    await rig.eventually(lambda: is_forgotten(rig, job))
    assert record.error is not None
    assert "is not stored" in record.error["message"]
    assert MARKER.encode() not in stored(rig)
    with pytest.raises(JobNotFailed):
        await rig.jobs.retry(OWNER, job)
    with pytest.raises(JobNotFailed):
        await rig.jobs.replay(job)


@SEALED
async def test_a_result_that_nobody_fetches_is_forgotten(rig: Rig) -> None:
    """After its time. A job that is not sealed has none."""
    await rig.worker()
    job, other = await rig.submit(MARKER, retain_none=True), await rig.submit()
    for one in (job, other):
        await rig.ended(one)
    await rig.eventually(lambda: rig.broker.job_log.outcome_queue.items == set())
    assert not await is_forgotten(rig, job)
    rig.clock.ahead = UNFETCHED_RESULT_S + 1
    await rig.eventually(lambda: is_forgotten(rig, job))
    assert await rig.text(other) == "hello you"


@SEALED
async def test_a_job_whose_key_is_lost_fails(rig: Rig) -> None:
    """It cannot run, and does not run as if it were plain."""
    job = await rig.submit(MARKER, retain_none=True)
    del rig.broker.job_log.content_keys[job]
    await rig.worker()
    record = await rig.ended(job)
    assert record.error is not None
    assert (record.status, record.error["code"]) == (JobStatus.FAILED, "content_gone")
    assert rig.ran == []
