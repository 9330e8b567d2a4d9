"""Two attempts at one job at once: a worker that was cut off for a while goes on, and is the first to end the job after all."""

from __future__ import annotations

from contextlib import aclosing

import pytest

from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.bus import MemoryBroker
from backbone.testing.job_log import MemoryJobLog
from gateway.jobs.api import EventsExpired, JobEvent
from gateway.jobs.event_stream import JobEventStream
from gateway.jobs.records import record_from_outcome
from schemas.frames import AttemptStarted, FrameKind, encode_frame
from schemas.job_events import NO_TOKEN, QUEUED
from schemas.jobs import Capability, JobStatus
from schemas.outcome import Outcome

JOB = "job_01a20f1b33c97ef68834fadc3c3648a7"
STARTED = AttemptStarted(worker="w", backend="echo").model_dump_json().encode()
WORD = Outcome(
    job=JOB,
    status=JobStatus.COMPLETED,
    owner="o",
    endpoint="/v1/chat/completions",
    capability=Capability.CHAT,
    model="m",
    public_model="m",
    token="first",
    delivery=1,
    events=4,
)
RECORD = record_from_outcome(WORD)
QUEUED_RECORD = RECORD.model_copy(update={"status": JobStatus.QUEUED, "finished_at": None})
WHOLE = ["first.1", "first.2", "first.3"]


class Told:
    """What a caller holds: what came of an attempt is void when the next one begins."""

    def __init__(self, last: str = "", chunks: tuple[str, ...] = ()) -> None:
        self.last = last
        self.kinds: list[str] = []
        self.chunks = list(chunks)

    def take(self, event: JobEvent) -> None:
        self.last = event.id
        self.kinds.append(event.kind.removeprefix("job."))
        if event.kind in {"job.started", "job.restarted"}:
            self.chunks = []
        elif event.kind == "job.chunk":
            self.chunks.append(event.data.decode())


async def say(log: MemoryJobLog, token: str, delivery: int, start: int, end: int) -> None:
    """Events of one attempt: 0 is its start."""
    for seq in range(start, end):
        kind, payload = (FrameKind.STARTED, STARTED) if seq == 0 else (FrameKind.CHUNK, f"{token}.{seq}".encode())
        await log.append_event(JOB, encode_frame(kind.value, 1, delivery, seq, token, payload))


@pytest.fixture
async def log() -> MemoryJobLog:
    """A log in which a second attempt starts after the first one stored its events and before its outcome."""
    log = MemoryJobLog(MemoryBroker())
    await log.start()
    await log.append_event(JOB, encode_frame(QUEUED, 1, 0, 0, NO_TOKEN, QUEUED_RECORD.encode()))
    await say(log, "first", 1, 0, 4)
    return log


async def follow(log: MemoryJobLog, told: Told, *, most: int = 100, before_end: bool = False) -> Told:
    record = QUEUED_RECORD if before_end else RECORD
    async with aclosing(JobEventStream(log, MemoryBlobStore(), record, told.last).events()) as events:
        async for event in events:
            if event is None:
                if before_end:
                    await log.store_outcome(WORD, b"")
                continue
            told.take(event)
            if len(told.kinds) == most:
                break
    return told


async def test_a_follower_receives_the_attempt_that_ended_the_job(log: MemoryJobLog) -> None:
    """A caller that saw the second attempt start receives a restart and the complete first attempt."""
    await say(log, "second", 2, 0, 3)
    told = await follow(log, Told(), before_end=True)
    assert told.kinds == [
        "queued",
        "started",
        *["chunk"] * 3,
        "restarted",
        *["chunk"] * 2,
        "restarted",
        *["chunk"] * 3,
        "completed",
    ]
    assert told.chunks == WHOLE
    assert told.last == "1-1-4"


@pytest.mark.parametrize("most", [1, 2, 3])
async def test_a_resumed_stream_is_complete(log: MemoryJobLog, most: int) -> None:
    """A caller that is cut off repeatedly within either attempt ends with the first attempt's answer."""
    await say(log, "second", 2, 0, 3)
    await log.store_outcome(WORD, b"")
    for had in (
        Told(),
        Told("1-0-0"),
        Told("1-1-2", ("first.1", "first.2")),
        Told("1-2-0"),
        Told("1-2-1", ("second.1",)),
    ):
        while had.kinds[-1:] != ["completed"]:
            had.kinds = []
            await follow(log, had, most=most)
        assert had.chunks == WHOLE


async def test_a_late_follower_receives_one_attempt(log: MemoryJobLog) -> None:
    """An ended job returns only the events of the attempt that ended it."""
    await say(log, "second", 2, 0, 3)
    await log.store_outcome(WORD, b"")
    told = await follow(log, Told())
    assert told.kinds == ["queued", "started", "chunk", "chunk", "chunk", "completed"]
    assert told.chunks == WHOLE


async def test_ids_of_two_attempts_that_are_the_same(log: MemoryJobLog) -> None:
    """After NATS lost its delivery count, an id may belong to either attempt. No caller receives a mixture."""
    await say(log, "second", 1, 0, 3)
    await log.store_outcome(WORD, b"")
    told = await follow(log, Told("1-1-2", ("second.1", "second.2")))
    assert told.chunks == WHOLE


async def test_lost_events_are_reported(log: MemoryJobLog) -> None:
    """Events of the attempt that ended it are missing: an error, and no end that looks whole."""
    await say(log, "second", 2, 0, 3)
    await log.store_outcome(WORD.model_copy(update={"events": 5}), b"")
    with pytest.raises(EventsExpired):
        await follow(log, Told())
