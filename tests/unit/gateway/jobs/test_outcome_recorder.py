"""The outcome recorder: records each outcome once, across outages and concurrent recoveries of records."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from backbone.testing.job_log import MemoryJobLog
from schemas.errors import NotFound, Unavailable
from schemas.jobs import Capability, JobRecord, JobStatus, Upload
from schemas.outcome import Outcome, outcome_of
from tests.unit.gateway.jobs.rig import OWNER, Rig

COMPLETED, FAILED = JobStatus.COMPLETED, JobStatus.FAILED
HOOK = "https://example.com/hook"


async def test_an_outcome_is_recorded_once(rig: Rig) -> None:
    """One of many gateways records it, and queues its webhook once."""
    others = [await rig.gateway() for _ in range(3)]
    await rig.worker()
    jobs = [await rig.submit(webhook=HOOK) for _ in range(20)]
    for job in jobs:
        assert (await rig.ended(job)).status is COMPLETED
    await rig.eventually(lambda: len(rig.hooks) == len(jobs))
    assert sorted(outcome.job for outcome in rig.hooks) == sorted(jobs)
    assert sum(gateway.counted("jobs_ended") for gateway in rig.gateways) == len(jobs)
    assert len(others) == 3
    assert rig.broker.job_log.outcome_queue.items == set()


async def test_outcomes_wait_while_the_store_is_unavailable(rig: Rig) -> None:
    """Jobs end and results are available at once; the records follow."""
    await rig.worker()
    rig.gate.clear()
    jobs = [await rig.submit(webhook=HOOK) for _ in range(3)]
    await rig.eventually(lambda: len(rig.ran) == 3)
    rig.store.available = False
    rig.gate.set()
    await rig.eventually(lambda: len(rig.broker.job_log.outcomes) == 3)
    assert await rig.text(jobs[0]) == "hello you"
    with pytest.raises(Unavailable):
        await rig.jobs.get(OWNER, jobs[0])
    assert rig.hooks == []
    rig.store.available = True
    for job in jobs:
        assert (await rig.ended(job)).status is COMPLETED
    await rig.eventually(lambda: len(rig.hooks) == 3)


async def test_a_job_has_ended_before_that_is_recorded(rig: Rig) -> None:
    """A poll shows the end although the record does not have it yet."""
    record = await rig.jobs.get(OWNER, await rig.submit())
    for gateway in rig.gateways:
        for task in gateway._tasks:
            task.cancel()
    await rig.gateways[0].terminator.terminate(record, JobStatus.CANCELLED)
    stored = await rig.store.get(OWNER, record.job)
    assert stored is not None
    assert stored.status is JobStatus.QUEUED
    assert await rig.status(record.job) is JobStatus.CANCELLED
    assert (await rig.jobs.wait(OWNER, record.job, 60)).status is JobStatus.CANCELLED


async def test_a_cancelled_job_leaves_the_queue_whatever_happens_to_nats(rig: Rig) -> None:
    """NATS does not answer the gateway that cancels it, nor the first that records that: no worker may ever come for its model."""
    record = await rig.jobs.get(OWNER, await rig.submit())
    withdraw = MemoryJobLog.delete_job
    refused: list[tuple[Any, ...]] = []

    async def away(self: MemoryJobLog, *job: Any) -> None:
        if len(refused) < 2:
            refused.append(job)
            raise Unavailable("NATS does not answer")
        await withdraw(self, *job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryJobLog, "delete_job", away)
        assert await rig.gateways[0].terminator.terminate(record, JobStatus.CANCELLED)
        await rig.eventually(lambda: not rig.broker.jobs)
    assert len(refused) == 2


async def test_a_record_that_was_lost_is_rebuilt(rig: Rig) -> None:
    """At the latest by the end of its job."""
    await rig.worker()
    rig.gate.clear()
    job = await rig.submit(metadata={"a": "b"}, key="k")
    before = await rig.until(job, JobStatus.IN_PROGRESS)
    await rig.store.remove(OWNER, job)
    assert (await rig.jobs.get(OWNER, job)).created_at == before.created_at
    rig.gate.set()
    record = await rig.ended(job)
    assert (record.status, record.metadata, record.key, record.worker) == (COMPLETED, {"a": "b"}, "k", "w")
    assert abs(record.created_at - before.created_at) <= 1


async def test_a_concurrently_recovered_record_gets_its_outcome(rig: Rig) -> None:
    """Between the recorder's look and its own making of the record."""
    record = await rig.jobs.get(OWNER, await rig.submit())
    await rig.store.remove(OWNER, record.job)
    create = rig.store.create
    raced: list[bool] = []

    async def late(new: JobRecord, **kwargs: Any) -> bool:
        if not raced:
            raced.append(await create(record, ttl_s=60, due_s=60))
        return await create(new, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig.store, "create", late)
        await rig.gateways[0].terminator.terminate(record, JobStatus.CANCELLED)
        assert (await rig.ended(record.job)).status is JobStatus.CANCELLED
    assert raced == [True]


async def test_a_record_recovered_too_late_is_corrected(rig: Rig) -> None:
    """A recovery that started before the end creates a record of a waiting job."""
    record = await rig.jobs.get(OWNER, await rig.submit())
    await rig.gateways[0].terminator.terminate(record, JobStatus.CANCELLED)
    await rig.ended(record.job)
    await rig.store.remove(OWNER, record.job)
    await rig.store.create(record, ttl_s=3600, due_s=30)
    assert await rig.status(record.job) is JobStatus.CANCELLED
    rig.clock.ahead += 31
    await rig.until(record.job, JobStatus.CANCELLED)


async def test_a_webhook_that_cannot_be_queued_is_queued_later(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outcome is still recorded only once."""
    gateway, tries = rig.gateways[0], []

    async def enqueue(outcome: Outcome) -> None:
        tries.append(outcome.job)
        if len(tries) < 3:
            raise Unavailable

    monkeypatch.setattr(gateway.recorder, "_enqueue", enqueue)
    await rig.worker()
    job = await rig.submit(webhook=HOOK)
    await rig.eventually(lambda: len(tries) == 3)
    await rig.eventually(lambda: not rig.broker.job_log.outcome_queue.items)
    assert tries == [job] * 3
    assert gateway.counted("jobs_ended") == 1


async def test_uploads_are_deleted_with_their_job(rig: Rig) -> None:
    """Not while it may be tried again."""

    async def blob() -> str:
        writer = rig.blobs.writer(ttl_s=3600)
        await writer.write(b"{}")
        return (await writer.close()).name

    kept, gone = await blob(), await blob()
    ended = {}
    for name, status in ((kept, FAILED), (gone, COMPLETED)):
        record = await rig.jobs.get(OWNER, await rig.submit())
        outcome = Outcome(
            job=record.job, status=status, owner=OWNER, endpoint="/", capability=record.capability, model="echo",
            public_model="echo", uploads=(name,), token="t", seconds=0.5,
        )  # fmt: skip
        assert await rig.gateways[0].log.store_outcome(outcome)
        ended[name] = await rig.ended(record.job)
    await rig.eventually(lambda: gone not in rig.blobs.chunks_by_name())
    assert kept in rig.blobs.chunks_by_name()
    assert await rig.store.mean_service_time_s("chat", "echo") == 0.5


@pytest.mark.parametrize("status", [JobStatus.CANCELLED, JobStatus.EXPIRED])
async def test_uploads_are_deleted_if_a_gateway_ends_the_job(rig: Rig, status: JobStatus) -> None:
    """Cancelled jobs leave no blobs; the caller's own files stay."""
    writers = [rig.blobs.writer(ttl_s=3600) for _ in range(3)]
    for writer in writers:
        await writer.write(b"{}")
    body, upload, own = [(await writer.close()).name for writer in writers]
    submission = rig.submission()
    submission.received.body_blob = body
    submission.received.uploads = (
        Upload(field="file", size=2, blob=upload),
        Upload(field="file", size=2, blob=own, kept=True),
    )
    record = await rig.jobs.submit(submission)
    await rig.gateways[0].terminator.terminate(record, status)
    await rig.eventually(lambda: list(rig.blobs.chunks_by_name()) == [own])


async def test_uploads_are_deleted_if_the_outcome_was_already_recorded(rig: Rig) -> None:
    """Redis went away between the record and the rest."""
    writer = rig.blobs.writer(ttl_s=3600)
    await writer.write(b"{}")
    name = (await writer.close()).name
    record = await rig.jobs.get(OWNER, await rig.submit())
    await rig.store.move(OWNER, record.job, COMPLETED)
    await rig.gateways[0].terminator.store_outcome(
        outcome_of(record, COMPLETED).model_copy(update={"uploads": (name,)})
    )
    await rig.eventually(lambda: name not in rig.blobs.chunks_by_name())


@pytest.mark.parametrize("status", [JobStatus.CANCELLED, JobStatus.EXPIRED])
async def test_a_job_that_was_ended_leaves_the_queue(rig: Rig, status: JobStatus) -> None:
    """Also where the gateway that ended it died before it was out, and no worker is there to take it."""
    record = await rig.jobs.get(OWNER, await rig.submit())
    assert len(rig.broker.jobs) == 1
    assert await rig.gateways[0].terminator.store_outcome(outcome_of(record, status))
    await rig.eventually(lambda: not rig.broker.jobs)


async def test_an_outcome_of_an_older_run_changes_nothing(rig: Rig) -> None:
    """It waited while the store was away, and the job was tried again meanwhile."""
    await rig.worker("failing")
    job = await rig.submit(echo={"fail": "error", "fail_times": 1})
    await rig.until(job, FAILED)
    old = rig.broker.job_log.outcomes[job]
    rig.gate.clear()
    await rig.jobs.retry(OWNER, job)
    rig.broker.job_log.outcome_queue.add(job, old.outcome.encode(old.payload))
    await rig.eventually(lambda: not rig.broker.job_log.outcome_queue.items)
    assert await rig.status(job) in {JobStatus.QUEUED, JobStatus.IN_PROGRESS}
    rig.gate.set()
    await rig.until(job, COMPLETED)


async def test_a_malformed_outcome_is_dropped(rig: Rig) -> None:
    """It does not keep the others from being recorded."""
    for data in (b"", b"{}\n", b"\xff\xff"):
        rig.broker.job_log.outcome_queue.add("job_odd", data)
    await rig.eventually(lambda: not rig.broker.job_log.outcome_queue.items)
    await rig.worker()
    assert (await rig.ended(await rig.submit())).status is COMPLETED


async def test_an_owners_oldest_results_make_room_for_its_new_ones(rig: Rig) -> None:
    """Results of the bootstrap key, and of others, stay."""
    rig.max_result_bytes = 2 * 1024 * 1024
    await rig.worker()
    free = await rig.submit("x" * 900_000)
    await rig.ended(free)
    jobs = []
    for number in range(3):  # large answers: they are blobs
        jobs.append(await rig.submit(str(number) * 900_000, key="key_1"))
        await rig.ended(jobs[-1])
    await rig.eventually(lambda: jobs[0] not in rig.broker.job_log.outcomes)
    with pytest.raises(NotFound) as caught:
        await rig.jobs.result(OWNER, jobs[0])
    assert caught.value.info.code == "result_expired"
    for job in (free, *jobs[1:]):
        result = await rig.jobs.result(OWNER, job)
        assert result.blob is not None
        assert await rig.blobs.info(result.blob.name) is not None
    assert len(rig.blobs.chunks_by_name()) == 3


async def blob_of(rig: Rig, owner: str, size: int) -> str:
    writer = rig.blobs.writer(ttl_s=3600, owner=owner)
    await writer.write(b"x" * size)
    return (await writer.close()).name


async def ended_job(rig: Rig, number: int, payload: bytes, **fields: Any) -> str:
    """Store how a job of `key_1` ended, and wait until that is recorded."""
    fields = {"status": COMPLETED, "capability": Capability.CHAT, "owner": OWNER, "size": len(payload)} | fields
    outcome = Outcome(
        job=f"job_{number:032x}", endpoint="/", model="echo", public_model="echo", key="key_1", token="t", **fields
    )
    assert await rig.gateways[0].log.store_outcome(outcome, payload)
    await rig.eventually(lambda: not rig.broker.job_log.outcome_queue.items)
    return outcome.job


async def test_ended_jobs_without_results_make_room_too(rig: Rig) -> None:
    """Failed jobs, which keep their request, lose it first; then the jobs themselves are deleted. Jobs that run again stay."""
    rig.max_result_bytes = 6 * 1024
    jobs = [await ended_job(rig, number, b"x" * 2000, status=FAILED) for number in range(4)]
    assert jobs[0] not in rig.broker.job_log.outcomes
    assert await rig.store.get(OWNER, jobs[0]) is not None
    again = await rig.store.move(OWNER, jobs[1], JobStatus.QUEUED, run=2)
    assert again is not None
    for number in range(4, 20):
        await ended_job(rig, number, b"x" * 2000, status=FAILED)
    assert await rig.store.get(OWNER, jobs[0]) is None
    assert await rig.store.get(OWNER, jobs[1]) == again


async def test_results_of_an_unfinished_batch_make_no_room(rig: Rig) -> None:
    """Its output is made of them. When it has ended they are like others."""
    rig.max_result_bytes = 100_000
    rig.unfinished_batches.add("batch_1")
    lines = [await ended_job(rig, number, b"x" * 30_000, batch="batch_1") for number in range(3)]
    jobs = [await ended_job(rig, number, b"x" * 30_000) for number in range(3, 6)]
    assert set(lines) <= set(rig.broker.job_log.outcomes)
    assert jobs[0] not in rig.broker.job_log.outcomes
    rig.unfinished_batches.clear()
    for number in range(6, 9):
        await ended_job(rig, number, b"x" * 30_000)
    assert not set(lines) & set(rig.broker.job_log.outcomes)


async def test_results_by_url_count_with_their_jobs(rig: Rig) -> None:
    """They are deleted with them; a blob that a worker names but that is another owner's does not count."""
    rig.max_result_bytes = 1_000_000
    foreign = await blob_of(rig, "bob", 5_000_000)
    jobs, blobs = [], []
    for number in range(4):
        blobs.append(await blob_of(rig, OWNER, 300_000))
        urls = [{"url": "nexus-blob:" + name} for name in (blobs[-1], foreign)]
        payload = orjson.dumps({"data": urls if number == 0 else urls[:1]})
        jobs.append(await ended_job(rig, number, payload, capability=Capability.IMAGES))
    assert await rig.blobs.info(blobs[0]) is None
    assert all([await rig.blobs.info(name) is not None for name in blobs[1:]])
    assert jobs[0] not in rig.broker.job_log.outcomes
