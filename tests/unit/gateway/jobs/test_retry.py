"""Failed jobs tried again: by their owners, and from among the dead letters; also after a gateway died in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gateway.jobs.api import JobNotFailed
from schemas.errors import NotFound, QueueFull, Unavailable
from schemas.job_events import JobEventKind
from schemas.jobs import Envelope, JobRecord, JobStatus
from tests.unit.gateway.jobs.rig import OWNER, QUEUE_S, Rig

QUEUED, COMPLETED, FAILED = JobStatus.QUEUED, JobStatus.COMPLETED, JobStatus.FAILED


class Died(Exception):
    """A gateway is killed here."""


async def failed(rig: Rig, *, times: int = 1, **fields: Any) -> str:
    """A job that failed for good, and would not fail again; there is no worker any more."""
    await rig.worker("failing")
    job = await rig.submit("again", echo={"fail": "error", "fail_times": times}, **fields)
    assert (await rig.ended(job)).status is FAILED
    await rig.eventually(lambda: not rig.queued)
    return job


async def dead(rig: Rig) -> str:
    """A job among the dead letters, likewise."""
    await rig.worker("failing")
    job = await rig.submit("again", echo={"fail": "before", "fail_times": 3})
    assert (await rig.ended(job)).status is FAILED
    await rig.eventually(lambda: not rig.queued)
    return job


async def completed(rig: Rig, job: str, run: int = 2) -> JobRecord:
    async def look() -> JobRecord | None:
        record = await rig.store.get(OWNER, job)
        return record if record is not None and record.status is COMPLETED else None

    record = await rig.eventually(look, what=f"{job} completed")
    assert (record.run, record.attempts, record.error) == (run, 1, None)
    assert await rig.text(job) == "again"
    await rig.eventually(lambda: not rig.queued)
    return record


@contextmanager
def dying(part: Any, name: str) -> Iterator[None]:
    """Inside, its gateway is killed when it comes to this step."""

    async def die(*_: Any) -> None:
        raise Died

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, name, die)
        with pytest.raises(Died):
            yield


class TestRetry:
    async def test_a_failed_job_is_run_again(self, rig: Rig) -> None:
        """A new run, under its id, which begins without what the old one left."""
        job = await failed(rig)
        rig.gate.clear()
        record = await rig.jobs.retry(OWNER, job)
        assert (record.job, record.status, record.run, record.attempts) == (job, QUEUED, 2, 0)
        assert (record.error, record.finished_at, record.worker) == (None, None, None)
        rig.gate.set()
        await completed(rig, job)

    async def test_its_events_tell_both_runs(self, rig: Rig) -> None:
        """A follower receives a restart, and the ids continue."""
        job = await failed(rig, stream=True)
        before = await rig.events(job)
        rig.gate.clear()
        await rig.jobs.retry(OWNER, job)
        following = asyncio.create_task(rig.events(job, before[-1].id))
        rig.gate.set()
        events = await following
        assert [event.kind for event in events[:2]] == [JobEventKind.QUEUED, JobEventKind.RESTARTED]
        assert events[-1].kind is JobEventKind.COMPLETED
        assert all(event.id.startswith("2-") for event in events)

    async def test_of_two_at_once_there_is_one_run(self, rig: Rig) -> None:
        """Two concurrent retries on different gateways: the second one fails or returns the same run."""
        job = await failed(rig)
        other = await rig.gateway()
        rig.gate.clear()
        answers = await asyncio.gather(
            *(jobs.retry(OWNER, job) for jobs in (rig.jobs, other.jobs) * 3), return_exceptions=True
        )
        assert any(isinstance(answer, JobRecord) for answer in answers)
        assert all(isinstance(answer, JobNotFailed) or answer.run == 2 for answer in answers)  # type: ignore[union-attr]
        assert rig.queued == 1
        rig.gate.set()
        await completed(rig, job)
        assert len(rig.ran) == 2

    @pytest.mark.parametrize("status", [QUEUED, COMPLETED, JobStatus.CANCELLED])
    async def test_only_a_failed_job_is_run_again(self, rig: Rig, status: JobStatus) -> None:
        if status is COMPLETED:
            await rig.worker()
        job = await rig.submit()
        if status is JobStatus.CANCELLED:
            await rig.jobs.cancel(OWNER, job)
        if status is not QUEUED:
            await rig.ended(job)
        with pytest.raises(JobNotFailed, match=str(status)):
            await rig.jobs.retry(OWNER, job)

    async def test_it_may_fail_and_be_run_again_and_again(self, rig: Rig) -> None:
        job = await failed(rig, times=3)
        for run in (2, 3):
            await rig.jobs.retry(OWNER, job)
            await rig.eventually(lambda run=run: rig.broker.job_log.outcomes.get(job, ())[0:1] and
                                 rig.broker.job_log.outcomes[job].outcome.run == run)  # fmt: skip
            await rig.until(job, FAILED)
        await rig.jobs.retry(OWNER, job)
        await completed(rig, job, run=4)

    async def test_its_timeout_restarts(self, rig: Rig) -> None:
        """It would have ended at once otherwise, and for good."""
        job = await failed(rig, timeout_s=30)
        await rig.drain("failing")
        rig.clock.ahead += 60
        record = await rig.jobs.retry(OWNER, job)
        assert record.expires_at is not None
        assert record.expires_at > rig.clock.time()
        await rig.worker()
        await completed(rig, job)

    async def test_a_record_that_was_lost_is_no_obstacle(self, rig: Rig) -> None:
        job = await failed(rig)
        await rig.store.remove(OWNER, job)
        assert (await rig.jobs.get(OWNER, job)).status is FAILED
        assert (await rig.jobs.retry(OWNER, job)).run == 2
        await completed(rig, job)

    async def test_a_job_whose_request_was_deleted_cannot_be_retried(self, rig: Rig) -> None:
        job = await failed(rig)
        rig.broker.job_log.outcomes.clear()
        with pytest.raises(JobNotFailed, match="Submit the request again"):
            await rig.jobs.retry(OWNER, job)


class TestRefusals:
    async def test_a_full_queue_leaves_it_failed(self, rig: Rig) -> None:
        """And to be tried again, once there is room."""
        job = await failed(rig)
        await rig.drain("failing")
        rig.broker.max_per_queue = 0
        with pytest.raises(QueueFull):
            await rig.jobs.retry(OWNER, job)
        record = await rig.until(job, FAILED)
        assert (record.error or {})["message"]
        assert (await rig.events(job))[-1].kind is JobEventKind.FAILED
        rig.broker.max_per_queue = 10
        await rig.jobs.retry(OWNER, job)
        await rig.worker()
        await rig.until(job, COMPLETED)
        assert await rig.text(job) == "again"

    async def test_nats_away_leaves_it_to_be_tried_again(self, rig: Rig) -> None:
        """It is not known whether the new run is in the queue; to try again makes sure of it, and makes no third one."""
        job = await failed(rig)
        log = rig.gateways[0].log
        store = log.enqueue

        async def store_and_fall_silent(envelope: Envelope, body: bytes) -> int:
            await store(envelope, body)
            rig.broker.available = False
            raise Unavailable

        rig.gate.clear()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Unavailable):
            patch.setattr(log, "enqueue", store_and_fall_silent)
            await rig.jobs.retry(OWNER, job)
        rig.broker.available = True
        rig.gate.set()
        record = await rig.jobs.get(OWNER, job)
        if record.status is QUEUED:
            assert (await rig.jobs.retry(OWNER, job)).run == 2
        await completed(rig, job)


class TestDeathInTheMiddle:
    """A gateway that retries a job is killed after each of its steps."""

    async def test_before_the_job_is_in_the_queue(self, rig: Rig) -> None:
        """The record is queued but the queue has no message: the next retry stores it."""
        job = await failed(rig)
        await rig.drain("failing")
        with dying(rig.gateways[0].log, "enqueue"):
            await rig.jobs.retry(OWNER, job)
        assert (await rig.status(job), rig.queued) == (QUEUED, 0)
        assert (await rig.jobs.retry(OWNER, job)).run == 2
        await rig.worker()
        await completed(rig, job)

    @pytest.mark.parametrize("end", ["cancel", "time"])
    async def test_and_nobody_tries_again(self, rig: Rig, end: str) -> None:
        """It may be cancelled, and it expires in its time: the old run's end is no obstacle."""
        job = await failed(rig)
        await rig.drain("failing")
        with dying(rig.gateways[0].log, "enqueue"):
            await rig.jobs.retry(OWNER, job)
        if end == "cancel":
            assert (await rig.jobs.cancel(OWNER, job)).status is JobStatus.CANCELLED
            await rig.until(job, JobStatus.CANCELLED)
        else:
            rig.clock.ahead += QUEUE_S + 1
            await rig.until(job, JobStatus.EXPIRED)
        assert (await rig.events(job))[-1].outcome is not None
        assert rig.broker.job_log.outcomes[job].outcome.run == 2

    async def test_before_the_old_end_is_taken_back(self, rig: Rig) -> None:
        """The worker that gets the new run is let begin."""
        job = await failed(rig)
        await rig.drain("failing")
        with dying(rig.gateways[0].log, "delete_outcome"):
            await rig.jobs.retry(OWNER, job)
        assert await rig.status(job) is QUEUED
        await rig.worker()
        await completed(rig, job)

    async def test_a_cancel_in_the_midst_of_a_retry_holds(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        """The old end was in its way, and is taken back right then: that is no end of the new run."""
        job = await failed(rig)
        await rig.drain("failing")
        log = rig.gateways[0].log
        decide = log.store_outcome

        async def decide_late(*args: Any) -> bool:
            first = await decide(*args)
            if not first and rig.broker.job_log.outcomes[job].outcome.run == 1:
                await log.delete_outcome(job, rig.broker.job_log.outcomes[job].seq)
            return first

        delete_outcome = log.delete_outcome

        async def never(*_: Any) -> None:
            """The retry is as far as this."""

        monkeypatch.setattr(log, "delete_outcome", never)
        await rig.jobs.retry(OWNER, job)
        monkeypatch.setattr(log, "delete_outcome", delete_outcome)
        monkeypatch.setattr(log, "store_outcome", decide_late)
        assert (await rig.jobs.cancel(OWNER, job)).status is JobStatus.CANCELLED


class TestReplay:
    async def test_a_dead_letters_job_is_run_again(self, rig: Rig) -> None:
        """It is among them no more."""
        job = await dead(rig)
        record = await rig.jobs.replay(job)
        assert (record.status, record.run) == (QUEUED, 2)
        await completed(rig, job)
        with pytest.raises(NotFound):
            await rig.jobs.dead_letter(job)
        with pytest.raises(NotFound):
            await rig.jobs.replay(job)

    async def test_a_retry_takes_it_out_as_well(self, rig: Rig) -> None:
        job = await dead(rig)
        await rig.jobs.retry(OWNER, job)
        with pytest.raises(NotFound):
            await rig.jobs.dead_letter(job)
        await completed(rig, job)

    async def test_dead_letters_outlive_everything_else(self, rig: Rig) -> None:
        """Record and outcome are deleted: the dead letter alone is enough for a replay."""
        job = await dead(rig)
        await rig.store.remove(OWNER, job)
        rig.broker.job_log.outcomes.clear()
        rig.broker.job_log.events.clear()
        assert (await rig.jobs.replay(job)).run == 2
        await completed(rig, job)

    async def test_a_forgotten_letter_leaves_a_failed_job(self, rig: Rig) -> None:
        job = await dead(rig)
        await rig.jobs.delete_dead_letters(job)
        with pytest.raises(NotFound):
            await rig.jobs.delete_dead_letters(job)
        assert await rig.status(job) is FAILED
        await rig.jobs.retry(OWNER, job)
        await completed(rig, job)

    async def test_a_gateway_that_dies_before_it_takes_the_letter_out(self, rig: Rig) -> None:
        """The job runs; to replay the letter once more is refused."""
        job = await dead(rig)
        with dying(rig.gateways[0].log, "delete_dead_letter"):
            await rig.jobs.replay(job)
        await completed(rig, job)
        with pytest.raises(JobNotFailed, match="completed"):
            await rig.jobs.replay(job)
