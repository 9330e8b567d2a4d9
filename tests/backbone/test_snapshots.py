"""Streams taken from one NATS and made again in another: the same messages, sequences and consumers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from backbone.bus import subjects
from backbone.bus.job_log import JobLog
from backbone.bus.nats.backup import STREAMS, StreamBackup, StreamSnapshot
from backbone.bus.nats.broadcast import NatsBroadcast
from backbone.bus.nats.requests import JetStreamError
from backbone.bus.subjects import BLOBS_STREAM, CLAIMS_STREAM, EVENTS_STREAM, JOBS_STREAM, OUTCOMES_STREAM
from schemas.errors import Unavailable
from schemas.frames import encode_frame
from schemas.job_events import NO_TOKEN, QUEUED
from schemas.jobs import Capability, JobRecord, JobStatus
from tests.backbone.job_logs import World, envelope, new_job, outcome_of
from tests.conftest import Eventually, running
from tests.servers import Server, skip_if_borrowed, source


@asynccontextmanager
async def snapshots(url: str) -> AsyncIterator[StreamBackup]:
    one = StreamBackup(url)
    await one.start()
    try:
        yield one
    finally:
        await one.close()


@asynccontextmanager
async def a_world(url: str) -> AsyncIterator[World]:
    world = World(url)
    await world.open_queue()
    try:
        yield world
    finally:
        await world.close()


@pytest.fixture
def other_nats(tmp_path: Path) -> Iterator[Server]:
    """A second server of the test's own."""
    skip_if_borrowed("needs two nats-servers")
    yield from running(source().nats(tmp_path / "other"))


async def take(url: str, *streams: str, consumers: bool = True) -> dict[str, tuple[StreamSnapshot, list[bytes]]]:
    found = {}
    async with snapshots(url) as there:
        for stream in streams:
            chunks: list[bytes] = []
            taken = await there.save(stream, chunks.append, consumers=consumers)
            assert taken is not None
            found[stream] = (taken, chunks)
    return found


async def bring(url: str, found: dict[str, tuple[StreamSnapshot, list[bytes]]], **config: Any) -> None:
    async with snapshots(url) as there:
        for stream, (taken, chunks) in found.items():
            state = await there.restore(stream, StreamSnapshot(taken.config | config, taken.state), chunks)
            assert (state["messages"], state["last_seq"]) == (taken.state["messages"], taken.state["last_seq"])


async def words_of(log: JobLog, count: int) -> set[str]:
    """Return the jobs of this many outcomes that the recorder gets, and acknowledge them."""
    found = set()
    async with aclosing(log.consume_outcomes(max_unacked=64, ack_wait_s=10)) as outcomes:
        async for item in outcomes:
            found.add(item.id)
            await item.ack()
            if len(found) == count:
                return found
    raise AssertionError


def test_every_stream_is_saved() -> None:
    """None is forgotten when one is added."""
    assert sorted(STREAMS) == sorted(subjects.STREAMS)


async def test_outcomes_and_their_recorder_survive_a_restore(own_nats: Server, other_nats: Server) -> None:
    """Outcomes are the same and stay the first, and the recorder goes on where it was."""
    jobs = [new_job() for _ in range(300)]
    async with a_world(own_nats.url) as world:
        log = await world.gateway()
        for job in jobs[:200]:
            await log.store_outcome(outcome_of(job), b"a" * 3000)
        recorded = await words_of(log, 200)
        for job in jobs[200:]:
            await log.store_outcome(outcome_of(job), job.encode())
        claim = await log.claim("name", b"first")
    found = await take(own_nats.url, OUTCOMES_STREAM, CLAIMS_STREAM)
    await bring(other_nats.url, found)
    async with a_world(other_nats.url) as world:
        log = await world.gateway()
        stored_outcome = await log.read_outcome(jobs[250])
        assert stored_outcome is not None
        assert (stored_outcome.payload, stored_outcome.seq) == (jobs[250].encode(), 251)
        assert not await log.store_outcome(outcome_of(jobs[0], JobStatus.FAILED))
        assert await log.claim("name", b"second") == claim
        assert not await words_of(log, 100) & recorded


async def test_jobs_come_again_at_once(own_nats: Server, other_nats: Server) -> None:
    """Without their consumers, jobs that a worker had when it was lost with all else need not wait for it to fall silent."""
    async with a_world(own_nats.url) as world:
        log = await world.gateway()
        sent = [envelope(world) for _ in range(5)]
        seqs = [await log.enqueue(one, b"{}") for one in sent]
        await log.delete_job(world.queue, seqs[4], sent[4].job, sent[4].run)
        found = await take(own_nats.url, JOBS_STREAM, consumers=False)
        queue = world.queue
    await bring(other_nats.url, found)
    world = World(other_nats.url)
    world.queue = queue
    await world.open_queue()
    log = await world.gateway()
    assert [await log.queue_position(queue, seq) for seq in seqs[:4]] == [0, 1, 2, 3]
    assert await log.enqueue(envelope(world), b"{}") == 6
    await world.close()


async def test_what_was_stored_meanwhile(own_nats: Server, other_nats: Server) -> None:
    """A tail holds what came behind the snapshot, headers and all, and is stored behind it."""
    async with a_world(own_nats.url) as world:
        log = await world.gateway()
        await log.claim("early", b"1")
        found = await take(own_nats.url, CLAIMS_STREAM)
        for number in range(600):
            await log.claim(f"late{number}", b"%d" % number * 1000)
        async with snapshots(own_nats.url) as there:
            tail = [piece async for piece in there.read_tail(CLAIMS_STREAM, found[CLAIMS_STREAM][0].last_seq)]
    assert len(tail) == 600
    assert b"Nats-Sequence" not in tail[0].headers
    await bring(other_nats.url, found)
    async with snapshots(other_nats.url) as there:
        assert await there.append(tail) == 600
    async with a_world(other_nats.url) as world:
        log = await world.gateway()
        assert await log.claim("early", b"?") == b"1"
        assert await log.claim("late599", b"?") == b"599" * 1000


async def test_events_of_jobs_that_are_not_there(own_nats: Server) -> None:
    """They are deleted, unless there is an outcome; of a job whose retry was lost, the earlier run stays."""
    async with a_world(own_nats.url) as world:
        log = await world.gateway()
        jobs = [new_job() for _ in range(4)]
        kept, lost, ended, again = jobs
        for job, seq, run in ((kept, 10, 1), (lost, 11, 1), (ended, 12, 1), (again, 9, 1), (again, 13, 2)):
            await log.append_event(job, queued(job, seq, run))
        await log.append_event(lost, encode_frame("s", 1, 1, 0, "token", b"{}"))
        await log.store_outcome(outcome_of(ended))
        async with snapshots(own_nats.url) as there:
            assert await there.delete_lost_jobs(after=0, last={"NEXUS_JOBS": 10}) == 2
        assert [len(await log.first_events(job, 10)) for job in (kept, lost, ended, again)] == [1, 0, 1, 1]


def queued(job: str, seq: int, run: int) -> bytes:
    record = JobRecord(
        job=job,
        owner="o",
        endpoint="/e",
        model="m",
        public_model="m",
        capability=Capability.CHAT,
        created_at=1,
        run=run,
        seq=seq,
        queue_s=1,
    )
    return encode_frame(QUEUED, run, 0, 0, NO_TOKEN, record.encode())


async def test_a_stream_that_is_there(own_nats: Server) -> None:
    """It is not replaced; one that is not there is None."""
    async with a_world(own_nats.url) as world:
        await world.gateway()
        found = await take(own_nats.url, EVENTS_STREAM)
        with pytest.raises(JetStreamError, match="already"):
            await bring(own_nats.url, found)
        async with snapshots(own_nats.url) as there:
            assert await there.save(BLOBS_STREAM, lambda _: None) is None
            assert await there.state(BLOBS_STREAM) is None
            await there.delete(BLOBS_STREAM)


async def test_a_snapshot_that_was_cut(own_nats: Server, other_nats: Server) -> None:
    """NATS refuses it."""
    async with a_world(own_nats.url) as world:
        log = await world.gateway()
        for _ in range(50):
            await log.store_outcome(outcome_of(new_job()), b"a" * 3000)
        found = await take(own_nats.url, OUTCOMES_STREAM)
    taken, chunks = found[OUTCOMES_STREAM]
    whole = b"".join(chunks)
    with pytest.raises((JetStreamError, Unavailable)):
        await bring(other_nats.url, {OUTCOMES_STREAM: (taken, [whole[: len(whole) // 2]])})


async def test_nats_dies_in_the_middle(own_nats: Server) -> None:
    """The caller that takes a snapshot learns of it soon."""
    async with a_world(own_nats.url) as world:
        log = await world.gateway()
        await asyncio.gather(*(log.store_outcome(outcome_of(new_job()), os.urandom(400_000)) for _ in range(40)))
    async with snapshots(own_nats.url) as there:

        def kill(_: bytes) -> None:
            own_nats.kill()

        async with asyncio.timeout(60):
            with pytest.raises(Unavailable, match="lost"):
                await there.save(OUTCOMES_STREAM, kill)


async def test_gateways_are_heard(own_nats: Server, eventually: Eventually) -> None:
    """Whether one listens for notices is known without a registry."""
    async with snapshots(own_nats.url) as there:
        assert not await there.has_gateways()
        gateway = NatsBroadcast(own_nats.url, "g")
        await gateway.start()
        await gateway.subscribe("keys", lambda: None)
        assert await there.has_gateways()
        await gateway.close()
        await eventually(lambda: _none(there))


async def _none(there: StreamBackup) -> bool:
    return not await there.has_gateways()
