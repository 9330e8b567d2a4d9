"""Durable jobs' records on three nats-servers that hold them together: replicas lag, and one of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from backbone.bus.job_log import JobLog, Retention
from schemas.errors import QueueFull, Unavailable
from schemas.frames import decode_frame, encode_frame
from schemas.jobs import JobStatus
from tests.backbone.job_logs import MIB, World, envelope, new_job, outcome_of
from tests.conftest import Eventually, running
from tests.servers import Server, Source

KEPT = Retention(max_event_bytes=256 * MIB, max_outcome_bytes=64 * MIB, max_dead_letter_bytes=64 * MIB, replicas=3)


@pytest.fixture
def three_nats(servers: Source, tmp_path: Path) -> Iterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(contextlib.contextmanager(running)(server))
            for server in servers.nats_cluster(tmp_path, 3)
        ]


@pytest.fixture
async def world(three_nats: list[Server], eventually: Eventually) -> AsyncIterator[World]:
    world = World(",".join(server.url for server in three_nats), KEPT)

    async def elected() -> bool:
        with contextlib.suppress(Unavailable):
            await world.open_queue()
            return True
        return False

    await eventually(elected, timeout_s=40)
    yield world
    await world.close()


async def test_replicas_agree_and_one_may_die(world: World, three_nats: list[Server]) -> None:
    """Words, claims and places are the same from every gateway; a server dies while jobs stream, and no event is lost."""
    logs = [await _gateway(world) for _ in range(3)]
    for _ in range(10):
        await _decide_at_once(logs)
        name = secrets.token_hex(8)
        claims = await asyncio.gather(*(logs[n % 3].claim(name, b"%d" % n) for n in range(15)))
        assert len(set(claims)) == 1
    seqs = [await logs[n % 3].enqueue(envelope(world), b"{}") for n in range(9)]
    assert [await logs[n % 3].queue_position(world.queue, seq) for n, seq in enumerate(seqs)] == list(range(9))
    await _stream_while_one_dies(world, logs, three_nats)


async def _gateway(world: World) -> JobLog:
    async with asyncio.timeout(40):
        while True:
            with contextlib.suppress(Unavailable):
                return await world.gateway()


async def _decide_at_once(logs: list[JobLog]) -> None:
    job = new_job()
    outcomes = [outcome_of(job, JobStatus.FAILED, worker=f"w{n}") for n in range(9)]
    won = await asyncio.gather(*(logs[n % 3].store_outcome(outcome) for n, outcome in enumerate(outcomes)))
    assert won.count(True) == 1
    decisions = [await log.read_outcome(job) for log in logs]
    assert [one and one.outcome for one in decisions] == [outcomes[won.index(True)]] * 3
    assert decisions[0] is not None
    await logs[1].delete_outcome(job, decisions[0].seq)
    assert await logs[2].store_outcome(outcome_of(job, run=2))


async def _stream_while_one_dies(world: World, logs: list[JobLog], servers: list[Server]) -> None:
    job, count = new_job(), 2000
    writer = (await world.worker()).event_writer(job)
    readers = [asyncio.create_task(_follow(log, job, count)) for log in logs]
    for n in range(count):
        writer.append(encode_frame("c", 1, 1, n, "token", b"x" * 100))
        if n % 20 == 0:
            await asyncio.sleep(0.002)
        if n == count // 2:
            servers[0].kill()
    await asyncio.wait_for(writer.flush(), 60)
    for seqs in await asyncio.wait_for(asyncio.gather(*readers), 60):
        assert sorted(seqs) == list(range(count))


async def _follow(log: JobLog, job: str, count: int) -> list[int]:
    """The events' own numbers, without copies. A reader that learns of an outage goes on where it was."""
    seqs: dict[int, None] = {}
    after = 0
    while len(seqs) < count:
        with contextlib.suppress(Unavailable):
            async with aclosing(log.follow_events(job, after)) as events:
                async for event in events:
                    if event is not None:
                        after = event.seq
                        seqs[decode_frame(event.data).seq] = None
                    if len(seqs) == count:
                        break
    return list(seqs)


async def test_nothing_is_refused_while_one_of_three_dies(world: World, three_nats: list[Server]) -> None:
    """Every server leads some stream: whichever dies, calls wait for the new leader and are answered, none is refused."""
    logs = [await _gateway(world) for _ in range(3)]
    loop = asyncio.get_running_loop()
    refused: list[Unavailable] = []
    done = [0] * len(logs)

    async def load(index: int, until: float) -> None:
        log = logs[index]
        while loop.time() < until:
            job, one = new_job(), envelope(world)
            try:
                await log.delete_job(world.queue, await log.enqueue(one, b"{}"), one.job, one.run)
                await log.claim(secrets.token_hex(8), b"mine")
                await log.store_outcome(outcome_of(job))
                await log.read_outcome(job)
            except QueueFull:
                pass  # anyone who withdrew while there was no leader has left its job there
            except Unavailable as error:
                refused.append(error)
            done[index] += 1
            await asyncio.sleep(0.02)

    loading = [asyncio.create_task(load(n % 3, loop.time() + 8.0)) for n in range(6)]
    while not all(done):
        await asyncio.sleep(0.01)
    three_nats[1].kill()
    await asyncio.gather(*loading)
    assert refused == []
    assert all(count > 1 for count in done)
