"""Durable jobs from their submission to their result: attempts, failures, worker losses, time limits."""

from __future__ import annotations

import asyncio
import json

import orjson
import pytest

from backbone.bus.bus import Queue
from backbone.testing.store import list_jobs
from schemas.errors import ModelNotFound, RateLimited
from schemas.job_events import JobEventKind
from schemas.jobs import Capability, Envelope, JobStatus, Lane
from tests.unit.gateway.jobs.rig import OWNER, QUEUE_S, Rig

QUEUED, RUNNING, COMPLETED = JobStatus.QUEUED, JobStatus.IN_PROGRESS, JobStatus.COMPLETED
FAILED, CANCELLED, EXPIRED = JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED
SHORT = {"ack_wait_s": 0.3}
"""A lost worker's jobs come again soon."""


class TestAnswers:
    async def test_a_job_is_submitted_run_and_answered(self, rig: Rig) -> None:
        """The record shows each state, and the queue is empty at the end."""
        job = await rig.submit(metadata={"a": "b"})
        assert await rig.status(job) is QUEUED
        assert (await rig.jobs.estimate(await rig.jobs.get(OWNER, job)))[0] == 0
        await rig.worker()
        record = await rig.ended(job)
        assert (record.status, record.run, record.attempts, record.worker) == (COMPLETED, 1, 1, "w")
        assert (record.metadata, record.progress, record.error) == ({"a": "b"}, 1.0, None)
        assert record.usage is not None
        assert await rig.text(job) == "hello you"
        body = await rig.jobs.input(OWNER, job)
        assert isinstance(body, dict)
        assert body["messages"][-1]["content"] == "hello you"
        await rig.eventually(lambda: not rig.queued)
        assert rig.gateways[0].counted("jobs_submitted") == 1
        await rig.eventually(lambda: rig.gateways[0].counted("jobs_ended") == 1)

    async def test_a_stream_is_stored_event_by_event(self, rig: Rig) -> None:
        """Followed while it runs, and after its end, and from each event on: the same events, the same ids."""
        job = await rig.submit("one two three", stream=True)
        live = asyncio.create_task(rig.events(job))
        await rig.worker()
        events = await live
        kinds = [event.kind for event in events]
        assert kinds[:2] == [JobEventKind.QUEUED, JobEventKind.STARTED]
        assert set(kinds[2:-1]) == {JobEventKind.CHUNK}
        assert (kinds[-1], events[-1].outcome is not None) == (JobEventKind.COMPLETED, True)
        assert all(event.data.startswith(b"data: ") and event.data.endswith(b"\n\n") for event in events[2:-1])
        await rig.ended(job)
        assert [e[:3] for e in await rig.events(job)] == [e[:3] for e in events]
        for at, event in enumerate(events[:-1]):
            assert [e[:3] for e in await rig.events(job, event.id)] == [e[:3] for e in events[at + 1 :]]
        result = await rig.jobs.result(OWNER, job)
        assert result.data == b"".join(event.data for event in events[2:-1])
        assert result.content_type.startswith("text/event-stream")

    @pytest.mark.parametrize("size", [100_000, 600_000, 2_000_000])
    async def test_an_answer_of_any_size(self, rig: Rig, size: int) -> None:
        """A large one is a blob."""
        await rig.worker()
        job = await rig.submit(echo={"size": size, "tokens": 5})
        await rig.ended(job)
        result = await rig.jobs.result(OWNER, job)
        data = result.data
        if result.blob is not None:
            data = b"".join([piece async for piece in rig.blobs.read(result.blob.name)])
            assert len(data) == result.blob.size
        assert (result.blob is not None) == (size > 512 * 1024)
        assert len(orjson.loads(data)["choices"][0]["message"]["content"]) == size
        assert result.outcome.size == len(data)

    async def test_a_stream_with_large_pieces(self, rig: Rig) -> None:
        """Large pieces are stored by reference, and followers receive their bytes."""
        await rig.worker()
        job = await rig.submit(stream=True, echo={"size": 1_500_000, "tokens": 2})
        await rig.ended(job)
        assert "r" in rig.kinds(job)
        chunks = [event.data for event in await rig.events(job) if event.kind is JobEventKind.CHUNK]
        said = [orjson.loads(chunk[6:])["choices"][0]["delta"].get("content") or "" for chunk in chunks]
        assert len("".join(said)) == 1_500_000
        result = await rig.jobs.result(OWNER, job)
        assert result.blob is not None
        assert b"".join([piece async for piece in rig.blobs.read(result.blob.name)]) == b"".join(chunks)

    async def test_other_owners_know_nothing_of_it(self, rig: Rig) -> None:
        await rig.worker()
        job = await rig.submit()
        await rig.ended(job)
        for call in (rig.jobs.get, rig.jobs.result, rig.jobs.cancel, rig.jobs.retry):
            with pytest.raises(Exception, match="does not exist"):
                await call("mallory", job)
        with pytest.raises(Exception, match="does not exist"):
            await rig.jobs.wait_for_result("mallory", job, 0)

    async def test_what_cannot_be_run_is_refused(self, rig: Rig) -> None:
        with pytest.raises(ModelNotFound):
            await rig.submit(model="nope")
        assert rig.queued == 0
        assert await list_jobs(rig.store, OWNER) == []

    async def test_a_key_may_have_so_many_jobs_waiting(self, rig: Rig) -> None:
        await rig.submit(key="k", max_queued=1)
        with pytest.raises(RateLimited):
            await rig.submit(key="k", max_queued=1)
        await rig.submit(key="other", max_queued=1)
        assert rig.queued == 2


class TestFailures:
    async def test_a_transient_failure_is_tried_again(self, rig: Rig) -> None:
        """What came of the first attempt is void."""
        await rig.worker()
        job = await rig.submit("one two three four", stream=True, echo={"fail": "mid", "fail_times": 1})
        events = await rig.events(job)
        record = await rig.ended(job)
        assert (record.status, record.attempts, record.run) == (COMPLETED, 2, 1)
        first, second = record.history
        assert (first.end, first.number, second.end, second.number) == ("returned", 1, "completed", 2)
        assert first.code == "backend_error"
        assert second.first_output_ms is not None
        assert first.started_ms <= (first.ended_ms or 0) <= second.started_ms <= second.first_output_ms
        assert second.first_output_ms <= (second.ended_ms or 0)
        again = next(at for at, event in enumerate(events) if event.kind is JobEventKind.RESTARTED)
        chunks = b"".join(event.data for event in events[again:] if event.kind is JobEventKind.CHUNK)
        assert chunks == (await rig.jobs.result(OWNER, job)).data

    async def test_retries_that_are_used_up_end_among_the_dead_letters(self, rig: Rig) -> None:
        await rig.worker()
        job = await rig.submit(echo={"fail": "before"})
        record = await rig.ended(job)
        assert (record.status, record.attempts) == (FAILED, 3)
        assert record.error is not None
        assert record.error["type"] == "backend_error"
        letter = await rig.jobs.dead_letter(job)
        envelope, body = Envelope.decode(letter.message)
        assert (letter.outcome.dead, letter.outcome.attempts, envelope.job) == (True, 3, job)
        assert orjson.loads(body)["model"] == "echo"
        assert [one.outcome.job for one in await rig.jobs.dead_letters(before=None, limit=10)] == [job]
        await rig.eventually(lambda: rig.gateways[0].counted("dead_letters") == 1)
        await rig.eventually(lambda: not rig.queued)

    @pytest.mark.parametrize("fail", ["refuse", "error"])
    async def test_a_permanent_failure_ends_it_at_once(self, rig: Rig, fail: str) -> None:
        await rig.worker()
        job = await rig.submit(echo={"fail": fail})
        record = await rig.ended(job)
        assert (record.status, record.attempts) == (FAILED, 1)
        assert await rig.jobs.dead_letters(before=None, limit=10) == []
        result = await rig.jobs.result(OWNER, job)
        assert result.error is not None
        assert (result.data, result.error.message) == (b"", (record.error or {})["message"])
        assert [event.kind for event in await rig.events(job)][-1] is JobEventKind.FAILED

    @pytest.mark.parametrize("rig", [{"first_token_s": 0.1}], indirect=True)
    async def test_a_backend_that_says_nothing_runs_into_its_limit(self, rig: Rig) -> None:
        await rig.worker()
        job = await rig.submit(echo={"fail": "hang"})
        record = await rig.ended(job)
        assert (record.status, (record.error or {})["code"]) == (FAILED, "timeout")
        assert rig.stopped == [job]


class TestLostWorkers:
    async def test_a_drained_worker_hands_back_without_counting(self, rig: Rig) -> None:
        """As often as it may be: the job has not failed."""
        rig.gate.clear()
        job = await rig.submit()
        for number in range(5):
            await rig.worker(f"w{number}")
            await rig.until(job, RUNNING)
            await rig.drain(f"w{number}")
            record = await rig.until(job, QUEUED)
            assert (record.worker, rig.running) == (None, 0)
        await rig.worker("last")
        rig.gate.set()
        record = await rig.ended(job)
        assert (record.status, record.attempts, record.worker) == (COMPLETED, 1, "last")
        assert rig.kinds(job).count("b") == 5

    async def test_a_worker_that_stops_before_its_start_grant_stores_nothing(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No gateway has answered it yet: its attempt never was one."""
        monkeypatch.setattr("workers.attempt.REQUEST_RETRY_S", 60.0)
        await rig.open_queues()
        job = await rig.submit()
        await rig.close_gateways()
        worker = await rig.worker(drain_s=0.0)
        await rig.eventually(lambda: worker._attempts)
        await rig.drain()
        await rig.eventually(lambda: not worker._tasks)
        assert (rig.kinds(job), rig.queued) == ("q", 1)

    @pytest.mark.parametrize("rig", [SHORT], indirect=True)
    async def test_the_job_of_a_lost_worker_restarts(self, rig: Rig) -> None:
        rig.gate.clear()
        await rig.worker()
        job = await rig.submit("a b c", stream=True)
        await rig.until(job, RUNNING)
        assert rig.kill_attempts() == 1
        rig.gate.set()
        events = await rig.events(job)
        record = await rig.ended(job)
        assert (record.status, record.attempts) == (COMPLETED, 2)
        assert JobEventKind.RESTARTED in [event.kind for event in events]

    @pytest.mark.parametrize("rig", [SHORT], indirect=True)
    async def test_a_job_that_kills_its_workers_is_poison(self, rig: Rig) -> None:
        """Three starts, and it ends among the dead letters, saying so."""
        rig.gate.clear()
        await rig.worker()
        job = await rig.submit()
        for number in range(1, 4):
            await rig.eventually(lambda number=number: len(rig.ran) == number)
            rig.kill_attempts()
        record = await rig.ended(job)
        assert (record.status, record.attempts, (record.error or {})["code"]) == (FAILED, 3, "worker_lost")
        assert [(one.number, one.end) for one in record.history] == [
            (1, "worker_lost"),
            (2, "worker_lost"),
            (3, "worker_lost"),
        ]
        letter = await rig.jobs.dead_letter(job)
        assert (letter.outcome.dead, letter.outcome.attempts, len(rig.ran)) == (True, 3, 3)
        assert [event.kind for event in await rig.events(job)][-1] is JobEventKind.FAILED

    @pytest.mark.parametrize("rig", [SHORT], indirect=True)
    async def test_a_silent_workers_job_is_shown_as_waiting(self, rig: Rig) -> None:
        """No other worker serves the model: the job returns to the queue, and its record shows that."""
        rig.gate.clear()
        worker = await rig.worker()
        job = await rig.submit()
        await rig.until(job, RUNNING)
        await rig.worker_vanishes()
        record = await rig.until(job, QUEUED)
        assert (record.worker, record.progress, rig.queued) == (None, None, 1)
        assert not worker._attempts
        await rig.worker("next")
        rig.gate.set()
        assert (await rig.ended(job)).attempts == 2

    async def test_a_job_runs_though_no_gateway_is_there(self, rig: Rig) -> None:
        """Its worker begins without leave, and the next gateway records how it ended."""
        await rig.open_queues()
        job = await rig.submit(stream=True)
        await rig.close_gateways()
        await rig.worker()
        await rig.eventually(lambda: job in rig.broker.job_log.outcomes)
        await rig.eventually(lambda: not rig.queued)
        record = await rig.store.get(OWNER, job)
        assert record is not None
        assert record.status is QUEUED
        await rig.gateway()
        assert (await rig.ended(job)).status is COMPLETED
        assert (await rig.events(job))[-1].kind is JobEventKind.COMPLETED

    @pytest.mark.parametrize("rig", [SHORT], indirect=True)
    async def test_attempts_without_a_gateway_are_counted_by_what_they_stored(self, rig: Rig) -> None:
        """One is granted and lost, the next begins without leave, after more deliveries than attempts: two, to everybody."""
        rig.gate.clear()
        await rig.worker()
        job = await rig.submit("a b c", stream=True)
        await rig.until(job, RUNNING)
        await rig.close_gateways()
        await rig.worker_vanishes()
        for stored in rig.broker.jobs.values():
            stored.deliveries += 3  # given back before they began, or taken by workers that died at once
        rig.gate.set()
        await rig.worker("next")
        await rig.eventually(lambda: job in rig.broker.job_log.outcomes)
        await rig.gateway()
        assert (await rig.jobs.get(OWNER, job)).attempts == 2
        assert (await rig.ended(job)).attempts == 2
        assert json.loads((await rig.events(job))[-1].data)["attempts"] == 2

    async def test_nats_may_go_away_in_the_middle(self, rig: Rig) -> None:
        """Events of the outage are stored afterwards, and the answer is complete."""
        rig.gate.clear()
        await rig.worker()
        job = await rig.submit("a b c d e", stream=True)
        await rig.until(job, RUNNING)
        rig.broker.available = False
        rig.gate.set()
        await rig.eventually(lambda: rig.made == 7)
        rig.broker.available = True
        assert (await rig.ended(job)).status is COMPLETED
        chunks = [event.data for event in await rig.events(job) if event.kind is JobEventKind.CHUNK]
        assert b"".join(chunks) == (await rig.jobs.result(OWNER, job)).data


class TestLimits:
    async def test_a_key_may_have_so_many_jobs_running(self, rig: Rig) -> None:
        """The others wait, though there are slots; jobs of other keys go before them."""
        rig.max_running["k"] = 1
        rig.gate.clear()
        await rig.worker(slots=4)
        jobs = [await rig.submit(key="k") for _ in range(3)]
        other = await rig.submit(key="free")
        await rig.until(other, RUNNING)
        await rig.eventually(lambda: rig.running == 2)
        assert sorted([await rig.status(job) for job in jobs]) == [RUNNING, QUEUED, QUEUED]
        rig.gate.set()
        for job in jobs:
            assert (await rig.ended(job)).status is COMPLETED
        assert rig.most == 2

    @pytest.mark.parametrize("rig", [SHORT], indirect=True)
    async def test_a_lost_workers_job_is_not_held_against_itself(self, rig: Rig) -> None:
        """It counts as running when its next attempt asks; that must not keep it waiting."""
        rig.max_running["k"] = 1
        rig.gate.clear()
        await rig.worker()
        job = await rig.submit(key="k")
        await rig.until(job, RUNNING)
        rig.kill_attempts()
        await rig.eventually(lambda: len(rig.ran) == 2)
        assert (await rig.jobs.get(OWNER, job)).attempts == 2
        rig.gate.set()
        assert (await rig.ended(job)).status is COMPLETED

    async def test_a_job_that_waits_too_long_expires_and_never_runs(self, rig: Rig) -> None:
        job = await rig.submit()
        rig.clock.ahead += QUEUE_S + 1
        record = await rig.ended(job)
        assert (record.status, (record.error or {})["code"]) == (EXPIRED, "queue_timeout")
        assert rig.queued == 0
        await rig.worker()
        after = await rig.submit()
        await rig.ended(after)
        assert rig.ran == [after]
        assert [event.kind for event in await rig.events(job)] == [JobEventKind.QUEUED, JobEventKind.EXPIRED]

    async def test_a_caller_who_waits_gives_less_time(self, rig: Rig) -> None:
        """A synchronous request's limit on waiting."""
        await rig.worker()
        rig.gate.clear()
        for _ in range(4):
            await rig.submit()
        await rig.eventually(lambda: rig.running == 4)
        job = await rig.submit(caller_waits=True)
        assert (await rig.jobs.get(OWNER, job)).queue_s == rig.limits.queue_s

    async def test_a_timeout_ends_a_running_job_and_stops_its_backend(self, rig: Rig) -> None:
        rig.gate.clear()
        await rig.worker()
        job = await rig.submit(timeout_s=30)
        await rig.until(job, RUNNING)
        rig.clock.ahead += 31
        record = await rig.ended(job)
        assert (record.status, (record.error or {})["code"]) == (EXPIRED, "timeout")
        await rig.eventually(lambda: rig.stopped == [job])

    async def test_a_timeout_holds_while_a_job_waits(self, rig: Rig) -> None:
        job = await rig.submit(timeout_s=30)
        rig.clock.ahead += 31
        assert (await rig.ended(job)).status is EXPIRED

    async def test_what_is_not_yet_over_goes_on(self, rig: Rig) -> None:
        """A timer that expires early is set again."""
        job = await rig.submit()
        await rig.store.update(OWNER, job, due_s=0.0)
        rig.clock.ahead += QUEUE_S / 2
        await asyncio.sleep(0.1)  # some looks
        assert await rig.status(job) is QUEUED
        rig.clock.ahead += QUEUE_S / 2
        assert (await rig.ended(job)).status is EXPIRED


class TestCancel:
    async def test_a_queued_job_never_runs(self, rig: Rig) -> None:
        job = await rig.submit()
        assert (await rig.jobs.cancel(OWNER, job)).status is CANCELLED
        assert rig.queued == 0
        await rig.worker()
        after = await rig.submit()
        await rig.ended(after)
        assert rig.ran == [after]
        assert (await rig.ended(job)).status is CANCELLED
        assert [event.kind for event in await rig.events(job)] == [JobEventKind.QUEUED, JobEventKind.CANCELLED]

    async def test_a_running_jobs_backend_is_stopped(self, rig: Rig) -> None:
        rig.gate.clear()
        await rig.worker()
        job = await rig.submit(stream=True)
        await rig.until(job, RUNNING)
        following = asyncio.create_task(rig.events(job))
        assert (await rig.jobs.cancel(OWNER, job)).status is CANCELLED
        await rig.eventually(lambda: rig.stopped == [job])
        await rig.eventually(lambda: not rig.queued)
        assert (await following)[-1].kind is JobEventKind.CANCELLED
        assert (await rig.ended(job)).worker == "w"

    async def test_a_job_that_moves_while_it_is_cancelled(self, rig: Rig) -> None:
        """It is stored in the queue after it was deleted from its backlog, and leaves the queue, too."""
        job = await rig.submit()
        (stored,) = rig.broker.jobs.values()
        await rig.jobs.cancel(OWNER, job)
        await rig.ended(job)
        await rig.eventually(lambda: not rig.queued)
        rig.broker.seq_by_message_id.clear()
        seq = rig.broker.store(stored.queue, stored.message, f"{job}.1", OWNER)
        await rig.gateways[0].terminator.record_move(OWNER, job, 1, seq)
        assert not rig.queued

    async def test_a_worker_that_misses_the_cancel_learns_it_from_the_gate(self, rig: Rig) -> None:
        """The record has no worker yet, so none is notified; the reply to the next heartbeat is STOP."""
        rig.gate.clear()
        worker = await rig.worker()
        job = await rig.submit()
        record = await rig.until(job, RUNNING)
        await rig.gateways[0].terminator.terminate(record.model_copy(update={"worker": None, "seq": 10**6}), CANCELLED)
        for attempt in worker._attempts.values():
            attempt.send_heartbeat()
        await rig.eventually(lambda: rig.stopped == [job])
        await rig.eventually(lambda: not rig.queued)

    async def test_what_has_ended_stays_as_it_is(self, rig: Rig) -> None:
        await rig.worker()
        job = await rig.submit()
        await rig.ended(job)
        assert (await rig.jobs.cancel(OWNER, job)).status is COMPLETED
        assert await rig.text(job) == "hello you"

    async def test_an_answer_that_comes_too_late_is_dropped(self, rig: Rig) -> None:
        """Also the blob that it was in."""
        rig.gate.clear()
        await rig.worker()
        job = await rig.submit(echo={"size": 600_000})
        record = await rig.until(job, RUNNING)
        await rig.gateways[0].terminator.terminate(record.model_copy(update={"worker": None, "seq": 10**6}), CANCELLED)
        rig.gate.set()
        await rig.eventually(lambda: not rig.queued)
        assert (await rig.ended(job)).status is CANCELLED
        await rig.eventually(lambda: not rig.blobs.chunks_by_name())

    async def test_a_lane_sets_the_priority(self, rig: Rig) -> None:
        """And each waits in a queue of its own."""
        for lane in (Lane.FLEX, Lane.DEFAULT, Lane.PRIORITY):
            await rig.submit(lane=lane)
        assert {job.queue for job in rig.broker.jobs.values()} == {
            Queue(Capability.CHAT, lane, "echo") for lane in Lane
        }


class TestCancelledAtItsStart:
    async def test_the_backend_stops_within_two_seconds(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        """The start was not recorded, so the worker was not notified; its early first heartbeat learns of the cancel."""
        assert rig.ack_wait_s / 3 > 2
        rig.gate.clear()
        await rig.worker()
        job = await rig.submit()
        await rig.eventually(lambda: rig.running == 1)
        monkeypatch.setattr(rig.gateways[0].dispatcher.bus, "send_control", lambda *_: None)
        await rig.jobs.cancel(OWNER, job)
        async with asyncio.timeout(2.0):
            await rig.eventually(lambda: rig.stopped == [job])
        assert (await rig.ended(job)).status is CANCELLED
