"""The event stream of a job on any gateway: stored events, new events and the terminal event."""

from __future__ import annotations

import asyncio

import pytest

from gateway.jobs.api import EventsExpired, JobNotFound
from schemas.errors import InvalidRequest
from schemas.frames import AttemptStarted, FrameKind, encode_frame
from schemas.job_events import JobEventKind
from schemas.jobs import JobStatus
from schemas.outcome import Outcome
from tests.unit.gateway.jobs.rig import OWNER, Rig

STARTED, RESTARTED, CHUNK, COMPLETED = (
    JobEventKind.STARTED,
    JobEventKind.RESTARTED,
    JobEventKind.CHUNK,
    JobEventKind.COMPLETED,
)


class ScriptedJob:
    """A job whose attempts store what the test scripts."""

    def __init__(self, rig: Rig, job: str) -> None:
        self.rig, self.job = rig, job
        self.seqs: dict[str, int] = {}

    def start(self, token: str, delivery: int) -> None:
        self.seqs[token] = 0
        started = AttemptStarted(worker=token, backend="b").model_dump_json().encode()
        self._store(FrameKind.STARTED, token, delivery, started)

    def store_chunks(self, token: str, delivery: int, *chunks: bytes) -> None:
        for chunk in chunks:
            self._store(FrameKind.CHUNK, token, delivery, chunk)

    def _store(self, kind: FrameKind, token: str, delivery: int, payload: bytes) -> None:
        frame = encode_frame(kind.value, 1, delivery, self.seqs[token], token, payload)
        self.seqs[token] += 1
        self.rig.broker.job_log.append_event(self.job, frame)

    async def complete(self, token: str) -> None:
        record = await self.rig.jobs.get(OWNER, self.job)
        outcome = Outcome(
            job=self.job, status=JobStatus.COMPLETED, owner=OWNER, endpoint=record.endpoint, capability=record.capability,
            model="echo", public_model="echo", token=token, events=self.seqs[token],
        )  # fmt: skip
        assert self.rig.broker.job_log.store_outcome(outcome, b"answer")

    async def received(self, after: str = "") -> list[tuple[JobEventKind, str]]:
        return [(event.kind, event.id) for event in await self.rig.events(self.job, after)]


@pytest.fixture
async def scripted(rig: Rig) -> ScriptedJob:
    return ScriptedJob(rig, await rig.submit(stream=True))


async def test_a_caller_of_a_competing_attempt_receives_the_end(scripted: ScriptedJob) -> None:
    """From any id: a restart, the attempt that ended the job, and the terminal event."""
    scripted.start("a", 1)
    scripted.store_chunks("a", 1, b"data: a\n\n")
    scripted.start("b", 2)
    scripted.store_chunks("b", 2, b"data: b\n\n", b"data: b\n\n")
    scripted.store_chunks("a", 1, b"data: aa\n\n")
    await scripted.complete("a")
    whole = [(CHUNK, "1-1-1"), (CHUNK, "1-1-2"), (COMPLETED, "1-1-3")]
    assert await scripted.received("1-2-2") == [(RESTARTED, "1-1-0"), *whole]
    assert await scripted.received("1-1-1") == whole[1:]
    assert (await scripted.received())[1:] == [(STARTED, "1-1-0"), *whole]


async def test_a_caller_from_a_lost_delivery_count_receives_the_end(scripted: ScriptedJob) -> None:
    """Its number was greater than that of the attempt that ended the job."""
    scripted.start("a", 3)
    scripted.store_chunks("a", 3, b"data: a\n\n")
    scripted.start("b", 1)
    scripted.store_chunks("b", 1, b"data: b\n\n")
    await scripted.complete("b")
    assert await scripted.received("1-3-1") == [(RESTARTED, "1-1-0"), (CHUNK, "1-1-1"), (COMPLETED, "1-1-2")]


async def test_after_the_terminal_event_there_are_no_events(scripted: ScriptedJob) -> None:
    """A browser that comes back by itself after the end."""
    scripted.start("a", 1)
    await scripted.complete("a")
    events = await scripted.received()
    assert await scripted.received(events[-1][1]) == []


async def test_an_incomplete_stream_has_no_terminal_event(rig: Rig, scripted: ScriptedJob) -> None:
    """Some events are deleted: the caller gets an error, and the result is still stored."""
    scripted.start("a", 1)
    scripted.store_chunks("a", 1, b"data: 1\n\n", b"data: 2\n\n")
    await scripted.complete("a")
    del rig.broker.job_log.events[scripted.job][-1]
    with pytest.raises(EventsExpired):
        await scripted.received()
    rig.broker.job_log.events.clear()
    with pytest.raises(EventsExpired):
        await scripted.received("1-1-1")
    assert (await rig.jobs.result(OWNER, scripted.job)).data == b"answer"


async def test_many_follow_at_once(rig: Rig, scripted: ScriptedJob) -> None:
    """Callers follow through several gateways from several ids; disconnects do not affect the others."""
    gateways = [rig.gateways[0], await rig.gateway()]
    scripted.start("a", 1)
    scripted.store_chunks("a", 1, b"data: 1\n\n")

    async def follow(at: int, after: str) -> list[str]:
        return [event.id async for event in gateways[at % 2].jobs.follow(OWNER, scripted.job, after)]

    readers = [
        asyncio.create_task(follow(at, after)) for at, after in enumerate(["", "", "1-1-0", "1-1-1", "", "1-1-1"])
    ]
    await asyncio.sleep(0.05)
    readers.pop().cancel()
    scripted.store_chunks("a", 1, b"data: 2\n\n")
    await scripted.complete("a")
    ids = ["1-0-0", "1-1-0", "1-1-1", "1-1-2", "1-1-3"]
    assert await asyncio.gather(*readers) == [ids, ids, ids[2:], ids[3:], ids]
    assert rig.broker.job_log.watchers == {}


@pytest.mark.parametrize("after", ["x", "1-1", "1-1-1-1", "1;1;1"])
async def test_an_invalid_event_id_is_rejected(scripted: ScriptedJob, after: str) -> None:
    with pytest.raises(InvalidRequest):
        await scripted.received(after)


@pytest.mark.parametrize("job", ["", "job_1", "job_" + "g" * 32, "job_" + "0" * 32, "job_" + "0" * 31 + "*", "nexus.>"])
async def test_an_invalid_job_id_is_not_found(rig: Rig, job: str) -> None:
    """And comes near no subject."""
    with pytest.raises(JobNotFound):
        await rig.events(job)
    with pytest.raises(JobNotFound):
        await rig.jobs.get(OWNER, job)
