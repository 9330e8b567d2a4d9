"""A worker that forges events and outcomes of other workers' jobs has no effect on them."""

from __future__ import annotations

import pytest

from backbone.testing.job_log import MemoryWorkerLog
from schemas.frames import AttemptStarted, FrameKind, encode_frame
from schemas.job_events import JobEventKind
from schemas.jobs import Capability, JobStatus
from schemas.outcome import Outcome
from tests.unit.gateway.jobs.rig import OWNER, Rig

pytestmark = pytest.mark.parametrize("rig", [{"sealed": True}], indirect=True)
HOOK = "https://hooks.example/"


def forged(job: str) -> Outcome:
    return Outcome(
        job=job, status=JobStatus.COMPLETED, owner=OWNER, endpoint="/v1/chat/completions", capability=Capability.CHAT,
        model="echo", public_model="echo", webhook=HOOK, token="t", worker="evil", attempts=1,
    )  # fmt: skip


async def liar(rig: Rig) -> MemoryWorkerLog:
    log = MemoryWorkerLog(rig.broker)
    await log.start()
    return log


async def test_a_forged_outcome_creates_no_job(rig: Rig) -> None:
    """The forged job is in no list, has no result and sends no webhook."""
    job = "job_01a20f1b33c97ef68834fadc3c3648a7"
    assert await (await liar(rig)).store_outcome(forged(job), b"forged")
    await rig.eventually(lambda: job not in rig.broker.job_log.outcomes)
    assert await rig.store.get(OWNER, job) is None
    assert rig.hooks == []
    assert rig.gateways[0].counted("forgeries_refused") >= 1
    await rig.eventually(lambda: not rig.broker.job_log.outcome_queue.items)


async def test_a_job_ends_by_its_own_worker_though_another_one_was_first(rig: Rig) -> None:
    """Whenever the forged outcome comes: before its job is taken, or while it runs, again and again."""
    log = await liar(rig)
    job = await rig.submit(webhook=HOOK)
    await log.store_outcome(forged(job), b"forged")
    rig.gate.clear()
    await rig.worker()
    await rig.until(job, JobStatus.IN_PROGRESS)
    await rig.eventually(lambda: job not in rig.broker.job_log.outcomes)
    await log.store_outcome(forged(job), b"forged")
    rig.gate.set()
    record = await rig.ended(job)
    assert (record.status, record.worker) == (JobStatus.COMPLETED, "w")
    assert b"hello" in (await rig.jobs.result(OWNER, job)).data
    await rig.eventually(lambda: len(rig.hooks) == 1)
    assert rig.hooks[0].worker == "w"


async def test_the_worker_waits_until_a_forged_outcome_is_out_of_its_way(rig: Rig) -> None:
    """No gateway has looked at it when the answer is there: the job is not given up for it."""
    await rig.open_queues()
    await rig.worker()
    rig.gate.clear()
    job = await rig.submit()
    await rig.until(job, JobStatus.IN_PROGRESS)
    await rig.close_gateways()
    await (await liar(rig)).store_outcome(forged(job), b"forged")
    rig.gate.set()
    await rig.eventually(lambda: rig.made == 2)  # the answer, and its end
    assert rig.broker.job_log.outcomes[job].outcome.worker == "evil"
    await rig.gateway()
    assert (await rig.ended(job)).worker == "w"


async def test_a_cancel_counts_past_a_forged_outcome(rig: Rig) -> None:
    job = await rig.submit()
    await (await liar(rig)).store_outcome(forged(job), b"forged")
    assert (await rig.jobs.cancel(OWNER, job)).status is JobStatus.CANCELLED


async def test_forged_events_are_ignored_and_fail_no_job(rig: Rig) -> None:
    """Three attempts that began and were lost would make it a dead letter."""
    log = await liar(rig)
    job = await rig.submit(stream=True)
    writer = log.event_writer(job)
    started = AttemptStarted(worker="evil", backend="b").model_dump_json().encode()
    for number in range(5):
        writer.append(encode_frame(FrameKind.STARTED.value, 1, number + 1, 0, f"evil{number}", started))
        writer.append(encode_frame(FrameKind.CHUNK.value, 1, number + 1, 1, f"evil{number}", b"data: forged\n\n"))
    await writer.flush()
    await rig.worker()
    assert (await rig.ended(job)).status is JobStatus.COMPLETED
    events = await rig.events(job)
    assert not [event for event in events if b"forged" in event.data or b"evil" in event.data]
    assert [event.kind for event in events].count(JobEventKind.STARTED) == 1


async def test_a_record_that_redis_lost_is_that_of_the_gateway(rig: Rig) -> None:
    """A forged first event does not become the record."""
    job = await rig.submit(metadata={"order": "1"})
    record = await rig.jobs.get(OWNER, job)
    lie = record.model_copy(update={"owner": "mallory", "webhook": None}).model_dump_json().encode()
    stored = rig.broker.job_log.events[job]
    rig.broker.job_log.events[job] = []
    rig.broker.job_log.append_event(job, encode_frame("q", 1, 0, 0, "-", lie))
    rig.broker.job_log.events[job] += stored
    await rig.store.remove(OWNER, job)
    assert (await rig.jobs.get(OWNER, job)).metadata == {"order": "1"}
