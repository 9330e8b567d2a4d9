"""What is promised about durable jobs' records, on memory and on a real nats-server alike."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from backbone.bus.bus import Queue
from backbone.bus.job_log import JobLog, WorkerLog, WorkItem
from backbone.testing.bus import MemoryBroker
from backbone.testing.job_log import MemoryJobLog
from schemas.errors import QueueFull, RequestTooLarge, Unavailable
from schemas.frames import FrameKind
from schemas.job_events import GateReply, GateRequest, GateVerdict
from schemas.jobs import Capability, Envelope, JobStatus, Lane
from schemas.outcome import Outcome
from tests.backbone.job_logs import (
    MAX_PER_QUEUE,
    MIB,
    World,
    cancel,
    envelope,
    frames,
    new_job,
    next_of,
    outcome_of,
    read,
)
from tests.conftest import Eventually, running
from tests.servers import Server, source


@pytest.fixture(scope="module")
def log_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from running(source().nats(tmp_path_factory.mktemp("joblog")))


@pytest.fixture(params=["memory", "nats"])
def log_url(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("log_nats").url if request.param == "nats" else None


@pytest.fixture
async def world(log_url: str | None) -> AsyncIterator[World]:
    world = World(log_url)
    yield world
    await world.close()


# The queue


async def test_a_stored_job_is_pulled_and_a_repeated_store_changes_nothing(
    world: World, eventually: Eventually
) -> None:
    """A job that was accepted reaches a worker once, however often the gateway repeats itself."""
    await world.open_queue()
    log, jobs = await world.gateway(), list[Any]()
    one = envelope(world)
    seq = await log.enqueue(one, b"{}")
    assert await log.enqueue(one, b"{}") == seq
    again = await log.enqueue(one.model_copy(update={"run": 2}), b"{}")
    assert again > seq
    bus = await world.hand(jobs)
    bus.pull(world.queue, 5, 5.0, lambda *_: None)
    await eventually(lambda: len(jobs) == 2)
    assert [Envelope.decode(job.message)[0].run for job in jobs] == [1, 2]


async def test_a_full_queue_and_a_large_body_are_refused(world: World) -> None:
    """Callers learn at once that there is no room, or that their request is too large."""
    await world.open_queue()
    log = await world.gateway()
    for _ in range(MAX_PER_QUEUE):
        await log.enqueue(envelope(world), b"{}")
    with pytest.raises(QueueFull):
        await log.enqueue(envelope(world), b"{}")
    with pytest.raises(RequestTooLarge):
        await log.enqueue(envelope(world), b"x" * (9 * MIB))


async def test_a_place_counts_those_that_wait_before(world: World, eventually: Eventually) -> None:
    """`queue_position` counts the jobs that wait before it, not those that run or are done."""
    await world.open_queue()
    log, jobs = await world.gateway(), list[Any]()
    bus = await world.hand(jobs)
    stored = [envelope(world) for _ in range(8)]
    seqs = [await log.enqueue(one, b"{}") for one in stored]
    assert [await log.queue_position(world.queue, seq) for seq in seqs] == list(range(8))
    bus.pull(world.queue, 3, 5.0, lambda *_: None)
    await eventually(lambda: len(jobs) == 3)
    assert [await log.queue_position(world.queue, seq) for seq in seqs] == [0, 0, 0, 0, 1, 2, 3, 4]
    jobs[1].ack()

    def are(*wanted: int | None) -> Callable[[], Awaitable[bool]]:
        async def check() -> bool:
            return [await log.queue_position(world.queue, seq) for seq in seqs] == list(wanted)

        return check

    await eventually(are(0, None, 0, 0, 1, 2, 3, 4))
    # What a lost store once held there is no reason to delete what it holds now.
    await log.delete_job(world.queue, seqs[5], stored[4].job, stored[4].run)
    await log.delete_job(world.queue, seqs[5], stored[5].job, stored[5].run + 1)
    await log.delete_job(world.queue, seqs[4], stored[4].job, stored[4].run)
    await eventually(are(0, None, 0, 0, None, 1, 2, 3))
    other = Queue(Capability.CHAT, Lane.FLEX, world.queue.model)
    assert await log.queue_position(other, seqs[5]) is None
    assert await log.queue_position(world.queue, seqs[-1] + 1000) is None


# Events


async def test_events_are_read_from_the_start_and_then_as_they_come(world: World) -> None:
    """Anyone who follows a job gets what happened so far, hears that this is all for now, and then what comes."""
    log, job = await world.gateway(), new_job()
    writer = (await world.worker()).event_writer(job)
    await log.append_event(job, b"queued")
    for frame in frames(3):
        writer.append(frame)
    await writer.flush()
    async with aclosing(log.follow_events(job)) as events:
        seen = [await next_of(events) for _ in range(5)]
        assert [one and one.data for one in seen] == [b"queued", *frames(3), None]
        writer.append(b"later")
        event = await next_of(events)
        assert event.data == b"later"
        assert event.seq > seen[3].seq
    assert [one.data for one in await log.first_events(job, 2)] == [b"queued", b"event 0"]
    assert await log.first_events(new_job(), 2) == []
    async with aclosing(log.follow_events(job, seen[2].seq)) as events:
        assert await read(events, 2) == [b"event 2", b"later"]


async def test_a_mentioned_event_is_stored_soon(world: World) -> None:
    """What a gateway mentions reaches anyone who follows the job; one that is too large does no harm."""
    log, job = await world.gateway(), new_job()
    async with aclosing(log.follow_events(job)) as events:
        assert await next_of(events) is None
        if world.nats_url:
            log.append_event_unconfirmed(job, b"x" * (MIB + 1))
        log.append_event_unconfirmed(job, b"by the way")
        assert await read(events, 1) == [b"by the way"]


async def test_the_end_of_a_job_wakes_whoever_follows_it(world: World) -> None:
    """A reader is notified of the outcome: it need not poll."""
    log, job = await world.gateway(), new_job()
    async with aclosing(log.follow_events(job)) as events:
        assert await next_of(events) is None
        waiting = asyncio.create_task(anext(events))
        await log.append_event(new_job(), b"another job's")
        await log.store_outcome(outcome_of(job))
        assert await asyncio.wait_for(waiting, 20) is None
        await log.append_event(job, b"late")
        assert await read(events, 1) == [b"late"]


async def test_closing_a_log_ends_its_readers_and_consumers(world: World) -> None:
    """When a gateway stops, nobody waits for it forever."""
    log, job = await world.gateway(), new_job()
    async with (
        aclosing(log.follow_events(job)) as events,
        aclosing(log.consume_outcomes(max_unacked=1, ack_wait_s=30)) as outcomes,
    ):
        assert await next_of(events) is None
        waiting = [asyncio.create_task(anext(events))]
        # Words of other tests may come first.
        consuming = asyncio.create_task(_consume_all(outcomes))
        await asyncio.sleep(0)
        await log.close()
        for task in [*waiting, consuming]:
            with pytest.raises(Unavailable):
                await asyncio.wait_for(task, 20)


async def _consume_all(items: Any) -> None:
    async for item in items:
        await item.ack()


# Terminal words


async def test_the_first_outcome_wins_a_race(world: World) -> None:
    """However many end a job at once, it ends once, and everybody knows whether it was them."""
    gateways = [await world.gateway() for _ in range(2)]
    worker = await world.worker()
    job = new_job()
    assert await gateways[0].read_outcome(job) is None
    outcomes = [outcome_of(job, JobStatus.CANCELLED, worker=f"w{n}") for n in range(20)]
    sides: list[JobLog | WorkerLog] = [*gateways, worker]
    calls = [sides[n % 3].store_outcome(outcome, b"%d" % n) for n, outcome in enumerate(outcomes)]
    won = await asyncio.gather(*calls)
    assert won.count(True) == 1
    stored_outcome = await gateways[1].read_outcome(job)
    assert stored_outcome is not None
    assert stored_outcome.outcome == outcomes[won.index(True)]
    assert stored_outcome.payload == b"%d" % won.index(True)


async def test_a_deleted_outcome_makes_room_for_the_next_run(world: World) -> None:
    """A failed job is tried again: it ends again, and a late repetition of the retry changes nothing."""
    log, job = await world.gateway(), new_job()
    assert await log.store_outcome(outcome_of(job, JobStatus.FAILED), b"message")
    first = await log.read_outcome(job)
    assert first is not None
    await log.delete_outcome(job, first.seq + 1000)
    await log.delete_outcome(new_job(), first.seq)
    assert await log.read_outcome(job) == first
    await log.delete_outcome(job, first.seq)
    await log.delete_outcome(job, first.seq)
    assert await log.read_outcome(job) is None
    assert await log.store_outcome(outcome_of(job, run=2))
    await log.delete_outcome(job, first.seq)
    second = await log.read_outcome(job)
    assert second is not None
    assert second.outcome.run == 2
    assert second.seq > first.seq


async def test_a_watch_is_told_of_the_end(world: World) -> None:
    """`Prefer: wait` returns as soon as the job ends, and after its time if it does not."""
    log, other, job = await world.gateway(), await world.gateway(), new_job()
    async with log.watch_outcome(job) as wait:
        assert not await wait(0.05)
        waiting = asyncio.ensure_future(wait(20))
        await other.store_outcome(outcome_of(job))
        assert await waiting
        assert await wait(0)
    async with log.watch_outcome(job) as wait:
        assert not await wait(0.05)


async def test_each_outcome_goes_to_one_of_two_consumers(world: World) -> None:
    """Two gateways share in recording outcomes: each outcome once."""
    logs = [await world.gateway() for _ in range(2)]
    jobs = [new_job() for _ in range(60)]
    seen: list[str] = []
    enough = asyncio.Event()

    async def record(log: JobLog) -> None:
        async with aclosing(log.consume_outcomes(max_unacked=4, ack_wait_s=30)) as outcomes:
            async for item in outcomes:
                outcome, payload = Outcome.decode(item.data)
                assert outcome.job == item.id
                await item.ack()
                if outcome.job in jobs:
                    assert payload == b"answer"
                    seen.append(outcome.job)
                if len(seen) >= len(jobs):
                    enough.set()

    consumers = [asyncio.create_task(record(log)) for log in logs]
    await asyncio.gather(*(logs[0].store_outcome(outcome_of(job), b"answer") for job in jobs))
    await asyncio.wait_for(enough.wait(), 20)
    await cancel(*consumers)
    assert sorted(seen) == sorted(jobs)


# Questions of workers


async def test_one_gateway_answers_what_a_worker_asks(world: World, eventually: Eventually) -> None:
    """A worker gets one answer, from any gateway; what it only tells is not answered."""
    worker = await world.worker()
    answers: list[GateReply | None] = []
    ask = GateRequest(kind=FrameKind.STARTED, job=new_job(), run=1, delivery=2, token="t", owner="o", worker="w")
    if world.nats_url is None:
        worker.request_gate(ask, answers.append)
        await eventually(lambda: answers == [None])
    heard: list[GateRequest] = []

    async def gate(ask: GateRequest) -> GateReply | None:
        heard.append(ask)
        return None if ask.kind is FrameKind.RETURNED else GateReply(kind=GateVerdict.WAIT, delay_s=1.5)

    for _ in range(2):
        await (await world.gateway()).serve_gate_requests(gate)
    answers.clear()
    for _ in range(20):
        worker.request_gate(ask, answers.append)
    worker.request_gate(ask.model_copy(update={"kind": FrameKind.RETURNED}), answers.append)
    await eventually(lambda: len(answers) == 20 and len(heard) == 21)
    assert answers == [GateReply(kind=GateVerdict.WAIT, delay_s=1.5)] * 20
    assert heard.count(ask) == 20


# Dead letters


async def test_dead_letters_are_listed_newest_first_and_found_by_job(world: World) -> None:
    """Anyone who looks after the service sees what failed for good, page by page, and takes it out."""
    log, worker = await world.gateway(), await world.worker()
    outcomes = [outcome_of(new_job(), JobStatus.FAILED, dead=True) for _ in range(60)]
    for n, outcome in enumerate(outcomes):
        await worker.store_dead_letter(outcome, b"message %d" % n)
        await worker.store_dead_letter(outcome, b"again")
    newest = await log.list_dead_letters(limit=60)
    assert [one.outcome for one in newest] == outcomes[::-1]
    assert newest[0].message == b"message 59"
    assert newest[0].stored_at > 1_600_000_000
    page = await log.list_dead_letters(before=newest[9].seq, limit=5)
    assert page == newest[10:15]
    for letter in newest[:45]:
        assert await log.delete_dead_letter(letter.seq)
    assert not await log.delete_dead_letter(newest[0].seq)
    assert (await log.list_dead_letters(limit=3)) == newest[45:48]
    found = await log.find_dead_letter(outcomes[2].job)
    assert found is not None
    assert found.message == b"message 2"
    assert await log.find_dead_letter(outcomes[59].job) is None
    assert await log.list_dead_letters(limit=0) == []


# Claims


async def test_one_of_fifty_claims_wins(world: World) -> None:
    """Fifty requests with one Idempotency-Key make one job, and all of them learn which."""
    logs = [await world.gateway() for _ in range(2)]
    name = secrets.token_hex(16)
    values = [b"job_%d" % n for n in range(50)]
    found = await asyncio.gather(*(logs[n % 2].claim(name, value) for n, value in enumerate(values)))
    assert len(set(found)) == 1
    assert found[0] in values
    assert await logs[1].claim(name, b"later") == found[0]
    with pytest.raises(ValueError, match="token"):
        await logs[0].claim("a.b", b"")


# Backlogs


async def test_work_is_taken_once_and_comes_again_until_it_is_done(world: World) -> None:
    """A webhook's delivery that failed is tried again later; one that succeeded is forgotten."""
    log = await world.gateway()
    work_queue = log.work_queue("hooks")
    item_id = secrets.token_hex(8)
    await work_queue.put(item_id, b"data")
    await work_queue.put(item_id, b"data")
    async with aclosing(work_queue.consume(max_unacked=3, ack_wait_s=20)) as items:
        item: WorkItem = await next_of(items)
        assert (item.id, item.data, item.delivery) == (item_id, b"data", 1)
        item.nak(0.05)
        item = await next_of(items)
        assert (item.id, item.delivery) == (item_id, 2)
        await item.ack()
        other = secrets.token_hex(8)
        await work_queue.put(other, b"more")
        item = await next_of(items)
        assert item.id == other
        await item.ack()


async def test_work_of_a_dead_gateway_goes_to_another_one(world: World) -> None:
    """What a gateway had taken, and not finished when it died, another one does."""
    logs = [await world.gateway() for _ in range(2)]
    items = [log.work_queue("batches") for log in logs]
    item_id = secrets.token_hex(8)
    await items[0].put(item_id, b"data")
    async with aclosing(items[0].consume(max_unacked=1, ack_wait_s=1)) as first:
        taken: WorkItem = await next_of(first)
        assert taken.delivery == 1
        async with aclosing(items[1].consume(max_unacked=1, ack_wait_s=1)) as second:
            taken = await next_of(second)
            assert (taken.id, taken.delivery) == (item_id, 2)
            for _ in range(3):
                await asyncio.sleep(0.5)
                taken.extend()
            await taken.ack()


async def test_a_consumer_has_no_more_items_than_it_allows(world: World) -> None:
    """A gateway works on a bounded number of things at once; the rest is left to the others."""
    log, other = await world.gateway(), await world.gateway()
    work_queue = log.work_queue("hooks")
    ids = {secrets.token_hex(8) for _ in range(6)}
    for item_id in ids:
        await work_queue.put(item_id, b"")
    async with aclosing(work_queue.consume(max_unacked=2, ack_wait_s=30)) as mine:
        held: list[WorkItem] = [await next_of(mine) for _ in range(2)]
        more = asyncio.create_task(anext(mine))
        async with aclosing(other.work_queue("hooks").consume(max_unacked=10, ack_wait_s=30)) as theirs:
            others: list[WorkItem] = [await next_of(theirs) for _ in range(4)]
            assert {item.id for item in held} | {item.id for item in others} == ids
            assert not more.done()
            others[0].nak(0)
            await held[0].ack()
            last: WorkItem = await asyncio.wait_for(more, 20) if await _soon(more) else await next_of(theirs)
            assert last.id == others[0].id
            for item in [held[1], last, *others[1:]]:
                await item.ack()
        await cancel(more)


async def _soon(task: asyncio.Task[Any]) -> bool:
    await asyncio.wait((task,), timeout=1)
    return task.done()


async def test_what_was_not_given_out_goes_back_at_once(world: World) -> None:
    """A gateway that stops leaves nothing lying until its time is up."""
    log, other = await world.gateway(), await world.gateway()
    work_queue = log.work_queue("hooks")
    ids = {secrets.token_hex(8) for _ in range(5)}
    for item_id in ids:
        await work_queue.put(item_id, b"")
    async with aclosing(work_queue.consume(max_unacked=5, ack_wait_s=120)) as mine:
        item: WorkItem = await next_of(mine)
        item.nak(0)
    async with aclosing(other.work_queue("hooks").consume(max_unacked=5, ack_wait_s=120)) as theirs:
        found = [await next_of(theirs) for _ in range(5)]
        assert {one.id for one in found} == ids
        for one in found:
            await one.ack()


# The memory broker as a NATS that is away


async def test_memory_can_be_away_as_nats_can() -> None:
    """Tests may take the broker away: calls fail, events and readers wait, and all goes on when it is back."""
    world = World(None)
    log, worker, job = await world.gateway(), await world.worker(), new_job()
    writer = worker.event_writer(job)
    async with (
        aclosing(log.follow_events(job)) as events,
        aclosing(log.consume_outcomes(max_unacked=1, ack_wait_s=30)) as outcomes,
    ):
        assert await next_of(events) is None
        world.broker.available = False
        for call in (
            log.read_outcome(job),
            log.store_outcome(outcome_of(job)),
            log.append_event(job, b""),
            worker.store_outcome(outcome_of(job), b""),
        ):
            with pytest.raises(Unavailable):
                await call
        for frame in frames(1000):
            assert not writer.is_full
            writer.append(frame)
        assert writer.is_full
        settling = asyncio.create_task(writer.flush())
        reading = asyncio.create_task(read(events, 1000))
        consuming = asyncio.create_task(anext(outcomes))
        await asyncio.wait((settling, reading, consuming), timeout=0.05)
        assert not (settling.done() or reading.done() or consuming.done())
        world.broker.available = True
        await settling
        assert await reading == frames(1000)
        assert await worker.store_outcome(outcome_of(job), b"")
        assert (await consuming).id == job
    writer.close()
    writer.append(b"too late")
    with pytest.raises(Unavailable):
        await writer.flush()
    await world.close()


def test_a_work_queue_cannot_have_any_name() -> None:
    """A work queue never takes the name of another stream."""
    for name in ("jobs", "dlq", "a.b", "", "Hooks"):
        with pytest.raises(ValueError, match="work queue"):
            MemoryJobLog(MemoryBroker()).work_queue(name)
