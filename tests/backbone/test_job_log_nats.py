"""Durable jobs' records on NATS when it dies, is frozen, loses everything, or answers and is not heard."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import nats
import pytest

from backbone.bus.job_log import JobLog, Retention, StoredEvent, WorkItem
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.event_reader import MAX_BUFFERED_EVENTS
from backbone.bus.nats.job_log import NatsJobLog
from backbone.bus.nats.requests import JetStreamError
from backbone.bus.nats.worker_log import NatsWorkerLog
from backbone.bus.subjects import EVENTS_STREAM, OUTCOMES_STREAM
from schemas.errors import RequestTooLarge, Unavailable
from schemas.frames import FrameKind, decode_frame, encode_frame
from schemas.job_events import GateReply, GateRequest, GateVerdict
from schemas.jobs import JobStatus
from tests.backbone.job_logs import MIB, SMALL, World, cancel, envelope, frames, new_job, next_of, outcome_of, read
from tests.conftest import Eventually
from tests.jetstream import request
from tests.servers import Server, skip_if_borrowed


class Line:
    """A TCP line to a server, which can be cut, and can swallow what the server says."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._listener: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.deaf = False
        self.swallowed = 0

    async def open(self) -> str:
        self._listener = await asyncio.start_server(self._on_connect, "127.0.0.1")
        return f"nats://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def _on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writers |= {writer, to_there}
        for pump in (self._pump(reader, to_there, answers=False), self._pump(there, writer, answers=True)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if answers and self.deaf:
                    self.swallowed += len(data)
                    continue
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self.cut()
        if self._listener is not None:
            self._listener.close()
        await cancel(*self._pumps)


@pytest.fixture
async def world(own_nats: Server) -> AsyncIterator[World]:
    world = World(own_nats.url)
    yield world
    await world.close()


@pytest.fixture
async def line(own_nats: Server) -> AsyncIterator[Line]:
    line = Line(own_nats)
    yield line
    await line.close()


async def crash(server: Server) -> None:
    server.kill()
    await server.restart()


async def forget_everything(server: Server, url: str) -> None:
    """Leave the server as one whose disk was lost."""
    admin = NatsConnection(url, "admin")
    await admin.connect()
    names = (await request(admin, "STREAM.NAMES"))["streams"]
    server.pause()
    server.resume()
    for name in names:
        await request(admin, f"STREAM.DELETE.{name}")
    await admin.close()
    await crash(server)


# Events


async def test_events_survive_a_crash_of_nats_while_they_are_written(world: World, own_nats: Server) -> None:
    """NATS is killed while a job streams: its reader gets every event, in order, and once when copies are dropped."""
    log, job, count = await world.gateway(), new_job(), 2000
    writer = (await world.worker()).event_writer(job)
    seqs: list[int] = []

    async def follow() -> None:
        async with aclosing(log.follow_events(job)) as events:
            async for event in events:
                seq = decode_frame(event.data).seq if event else 0
                if event and (not seqs or seq > seqs[-1]):
                    assert seq == len(seqs)
                    seqs.append(seq)
                if len(seqs) == count:
                    return

    following = asyncio.create_task(follow())
    for n in range(count):
        writer.append(encode_frame("c", 1, 1, n, "token", b"x" * 200))
        if n == count // 2:
            own_nats.kill()
        if n % 10 == 0:
            await asyncio.sleep(0)
    restarting = asyncio.create_task(own_nats.restart())
    await asyncio.wait_for(writer.flush(), 30)
    await restarting
    await asyncio.wait_for(following, 30)
    stored = [decode_frame(event.data).seq for event in await log.first_events(job, 3 * count)]
    assert sorted(set(stored)) == seqs == list(range(count))


async def test_a_slow_reader_gets_what_did_not_wait_for_it(world: World) -> None:
    """A slow reader of a fast job gets all of its events in order; only so many wait for it in the gateway's memory."""
    log, job, count = await world.gateway(), new_job(), 5000
    writer = (await world.worker()).event_writer(job)
    found: list[bytes] = []
    async with aclosing(log.follow_events(job)) as events:
        for frame in frames(1000):
            writer.append(frame)
        found += await read(events, 500)
        for n in range(1000, count, 500):
            for frame in frames(500, start=n):
                writer.append(frame)
            await writer.flush()
            found += await read(events, 7)
        assert isinstance(log, NatsJobLog)
        (follower,) = log._event_readers
        assert len(follower._republished) <= MAX_BUFFERED_EVENTS
        found += await read(events, count - len(found))
        assert found == frames(count)
        writer.append(b"live")
        assert await read(events, 1) == [b"live"]


async def test_readers_join_while_a_job_streams(world: World) -> None:
    """Whenever a reader joins or resumes, it misses nothing and gets nothing twice."""
    log, job, count = await world.gateway(), new_job(), 3000
    writer = (await world.worker()).event_writer(job)

    async def whole(skip: int) -> list[bytes]:
        after = 0
        if skip:
            async with aclosing(log.follow_events(job)) as events:
                stored: list[StoredEvent] = []
                while len(stored) < skip:
                    event = await anext(events)
                    stored += [event] if event else []
                after = stored[-1].seq
        async with aclosing(log.follow_events(job, after)) as events:
            return await read(events, count - skip, 60)

    readers: list[asyncio.Task[list[bytes]]] = []
    for n in range(count):
        writer.append(b"event %d" % n)
        if n % 100 == 0:
            await writer.flush()
            readers.append(asyncio.create_task(whole(n // 2)))
    results = await asyncio.gather(*readers)
    for n, result in enumerate(results):
        assert result == frames(count)[n * 50 :]
    assert isinstance(log, NatsJobLog)
    assert not log._event_readers


async def test_large_events_are_read_whole(world: World) -> None:
    """Events as large as NATS takes are stored and read like small ones, however few of them fit one answer."""
    log, job = await world.gateway(), new_job()
    writer = (await world.worker()).event_writer(job)
    large = [b"%d" % n + b"x" * (MIB - 1) for n in range(5)]
    async with aclosing(log.follow_events(job)) as events:
        assert await next_of(events) is None
        for frame in large:
            writer.append(frame)
        await writer.flush()
        assert await read(events, 5) == large
    async with aclosing(log.follow_events(job)) as events:
        assert await read(events, 5) == large
    assert [event.data for event in await log.first_events(job, 9)] == large


async def test_old_events_make_room_for_new_ones(world: World) -> None:
    """Where events fill their room, the oldest go: a reader starts with the oldest that is left, and new ones are stored."""
    world.kept = Retention(max_event_bytes=MIB, max_outcome_bytes=MIB, max_dead_letter_bytes=MIB)
    log, job = await world.gateway(), new_job()
    writer = (await world.worker()).event_writer(job)
    for n in range(200):
        writer.append(b"%d " % n + b"x" * 10_000)
    await writer.flush()
    first = await log.first_events(job, 1)
    oldest = int(first[0].data.split()[0])
    assert 50 < oldest < 200
    async with aclosing(log.follow_events(job)) as events:
        found = [int(data.split()[0]) for data in await read(events, 200 - oldest)]
        assert found == list(range(oldest, 200))
        assert await next_of(events) is None


async def test_a_reader_goes_on_where_nats_lost_everything(world: World, own_nats: Server) -> None:
    """NATS comes back with an empty disk: streams are made again, and what is stored from then on is read."""
    skip_if_borrowed("wipes its NATS")
    log, worker, job = await world.gateway(), await world.worker(), new_job()
    async with (
        aclosing(log.follow_events(job)) as events,
        aclosing(log.consume_outcomes(max_unacked=2, ack_wait_s=30)) as outcomes,
    ):
        for frame in frames(20):
            await log.append_event(job, frame)
        assert await read(events, 20) == frames(20)
        consuming = asyncio.create_task(anext(outcomes))
        async with log.watch_outcome(job) as wait:
            await forget_everything(own_nats, own_nats.url)
            writer = worker.event_writer(job)
            writer.append(b"again")
            assert await read(events, 1, 30) == [b"again"]
            await writer.flush()
            assert await worker.store_outcome(outcome_of(job), b"")
            assert await wait(20)
        item: WorkItem = await asyncio.wait_for(consuming, 30)
        assert item.id == job
        await item.ack()
    work_queue = log.work_queue("hooks")
    await work_queue.put("a", b"1")


async def test_an_event_too_large_for_nats_is_refused_before_it_is_sent(world: World) -> None:
    """An oversized event is an error where it is made; the connection, and the other jobs on it, live on."""
    log, job = await world.gateway(), new_job()
    writer = (await world.worker()).event_writer(job)
    with pytest.raises(RequestTooLarge):
        writer.append(b"x" * (MIB + 1))
    with pytest.raises(RequestTooLarge):
        await log.append_event(job, b"x" * (MIB + 1))
    with pytest.raises(RequestTooLarge):
        await log.store_outcome(outcome_of(job), b"x" * MIB)
    writer.append(b"fine")
    await asyncio.wait_for(writer.flush(), 20)


async def test_what_was_not_stored_is_said_when_a_writer_is_closed(world: World, own_nats: Server) -> None:
    """Nobody takes an attempt's events for stored when they were not."""
    writer = (await world.worker()).event_writer(new_job())
    own_nats.pause()
    try:
        for _ in range(1000):
            assert not writer.is_full
            writer.append(b"x")
        assert writer.is_full
        settling = asyncio.create_task(writer.flush())
        await asyncio.sleep(0)
        writer.close()
        with pytest.raises(Unavailable):
            await settling
    finally:
        own_nats.resume()


# Confirmations that are not heard


async def test_a_lost_confirmation_does_not_store_a_job_twice(world: World, line: Line, eventually: Eventually) -> None:
    """The line breaks after a job was stored, before the gateway heard of it: it repeats itself, and the job is one."""
    await world.open_queue()
    log = NatsJobLog(await line.open(), "g", retention=SMALL)
    await log.start()
    world.closing.append(log)
    line.deaf = True
    storage_health = asyncio.create_task(log.enqueue(envelope(world), b"{}"))
    await eventually(lambda: line.swallowed)
    line.deaf = False
    line.cut()
    seq = await asyncio.wait_for(storage_health, 20)
    assert await log.queue_position(world.queue, seq) == 0
    assert await log.queue_position(world.queue, seq - 1) is None
    assert await log.queue_position(world.queue, await log.enqueue(envelope(world), b"{}")) == 1


async def test_an_outcome_without_its_confirmation_is_still_the_first(
    world: World, line: Line, eventually: Eventually
) -> None:
    """The line breaks after an outcome was stored: its sender learns that it was the first, not that it came late."""
    log = await world.gateway()
    worker = NatsWorkerLog(await line.open(), "w")
    await worker.start()
    world.closing.append(worker)
    for job in (new_job(), new_job()):
        line.deaf, line.swallowed = True, 0
        storing = asyncio.create_task(worker.store_outcome(outcome_of(job), b"answer"))
        await eventually(lambda: line.swallowed)
        assert not await log.store_outcome(outcome_of(job, JobStatus.CANCELLED))
        line.deaf = False
        line.cut()
        assert await asyncio.wait_for(storing, 20)
        stored_outcome = await log.read_outcome(job)
        assert stored_outcome is not None
        assert stored_outcome.payload == b"answer"


async def test_an_answer_that_never_comes_is_asked_for_again(world: World, line: Line, eventually: Eventually) -> None:
    """An answer is lost while the connection stands: the caller waits a little longer, and that is all."""
    await world.gateway()
    log = NatsJobLog(await line.open(), "g", retention=SMALL)
    await log.start()
    world.closing.append(log)
    job, name = new_job(), secrets.token_hex(8)
    line.deaf = True
    calls = [
        asyncio.create_task(call)
        for call in (log.store_outcome(outcome_of(job)), log.claim(name, b"mine"), log.append_event(job, b"event"))
    ]
    await eventually(lambda: line.swallowed)
    line.deaf = False
    assert [await asyncio.wait_for(call, 20) for call in calls] == [True, b"mine", None]
    assert await log.claim(name, b"late") == b"mine"


# Outages


async def test_a_short_outage_is_waited_out(world: World, own_nats: Server) -> None:
    """NATS restarts: what is stored meanwhile is stored when it is back."""
    await world.open_queue()
    log, worker, jobs = await world.gateway(), await world.worker(), [new_job() for _ in range(3)]
    own_nats.kill()
    calls: list[Any] = [
        asyncio.create_task(call)
        for call in (
            log.store_outcome(outcome_of(jobs[0])),
            worker.store_outcome(outcome_of(jobs[1]), b""),
            log.claim(secrets.token_hex(8), b"mine"),
            log.enqueue(envelope(world), b"{}"),
        )
    ]
    await own_nats.restart()
    results = [await asyncio.wait_for(call, 20) for call in calls]
    assert results[:3] == [True, True, b"mine"]
    assert await log.queue_position(world.queue, results[3]) == 0


async def test_a_job_that_is_not_deleted_for_certain_is_an_error(
    world: World, own_nats: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS is frozen as a job is to leave the queue: the caller learns that it has to ask again."""
    monkeypatch.setattr("backbone.bus.nats.requests.RETRY_TIMEOUT_S", 1.0)
    await world.open_queue()
    log, job = await world.gateway(), envelope(world)
    seq = await log.enqueue(job, b"{}")
    own_nats.pause()
    with pytest.raises(Unavailable):
        await log.delete_job(world.queue, seq, job.job, job.run)
    own_nats.resume()
    assert await log.queue_position(world.queue, seq) == 0
    await log.delete_job(world.queue, seq, job.job, job.run)
    assert await log.queue_position(world.queue, seq) is None


async def test_a_long_outage_is_an_error(world: World, own_nats: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """NATS stays away: every call ends, in the error that says so; gate requests end at once."""
    monkeypatch.setattr("backbone.bus.nats.requests.RETRY_TIMEOUT_S", 1.0)
    log, worker, job = await world.gateway(), await world.worker(), new_job()
    own_nats.kill()
    calls = (
        log.read_outcome(job),
        log.store_outcome(outcome_of(job)),
        log.append_event(job, b""),
        log.first_events(job, 1),
        log.list_dead_letters(),
    )
    ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
    assert [type(end) for end in ends] == [Unavailable] * len(calls)
    async with aclosing(log.follow_events(job)) as events:
        with pytest.raises(Unavailable):
            await next_of(events)
    answers: list[GateReply | None] = []
    told = asyncio.Event()
    ask = GateRequest(kind=FrameKind.HEARTBEAT, job=job, run=1, delivery=1, token="t", owner="o", worker="w")

    def take(answer: GateReply | None) -> None:
        answers.append(answer)
        told.set()

    worker.request_gate(ask, take)
    await asyncio.wait_for(told.wait(), 20)
    assert answers == [None]


async def test_a_question_without_gateways_is_told_at_once(world: World, eventually: Eventually) -> None:
    """No gateway is there: the worker need not wait five seconds to learn it."""
    worker, answers = await world.worker(), list[GateReply | None]()
    ask = GateRequest(kind=FrameKind.HEARTBEAT, job=new_job(), run=1, delivery=1, token="t", owner="o", worker="w")
    worker.request_gate(ask, answers.append)
    await eventually(lambda: answers == [None], timeout_s=4)


async def test_a_watch_is_told_of_an_end_during_an_outage(world: World, line: Line, eventually: Eventually) -> None:
    """A job ends while the waiting gateway is cut off: it learns it when it is back."""
    other, job = await world.gateway(), new_job()
    log = NatsJobLog(await line.open(), "g", retention=SMALL)
    await log.start()
    world.closing.append(log)
    async with log.watch_outcome(job) as wait, aclosing(log.follow_events(job)) as events:
        assert await next_of(events) is None
        waiting = asyncio.ensure_future(wait(30))
        line.deaf = True
        await other.append_event(job, b"missed")
        await other.store_outcome(outcome_of(job))
        await eventually(lambda: line.swallowed)
        line.deaf = False
        line.cut()
        assert await waiting
        assert await read(events, 1) == [b"missed"]
        assert await next_of(events) is None


async def test_work_items_and_outcomes_are_delivered_again_after_a_crash(world: World, own_nats: Server) -> None:
    """NATS crashes under the gateways that take work: all of it is done in the end, and they go on taking."""
    logs = [await world.gateway() for _ in range(2)]
    jobs, ids = {new_job() for _ in range(300)}, {secrets.token_hex(8) for _ in range(300)}
    done: set[str] = set()
    all_done = asyncio.Event()

    async def work(items: Any) -> None:
        async with aclosing(items):
            async for item in items:
                with contextlib.suppress(Unavailable):
                    await item.ack()
                    done.add(item.id)
                if done >= jobs | ids:
                    all_done.set()

    work_queues = [log.work_queue("hooks") for log in logs]
    consumers = [
        asyncio.create_task(work(work_queue.consume(max_unacked=8, ack_wait_s=2))) for work_queue in work_queues
    ]
    consumers += [asyncio.create_task(work(log.consume_outcomes(max_unacked=8, ack_wait_s=2))) for log in logs]
    writes: list[asyncio.Task[Any]] = [asyncio.create_task(logs[0].store_outcome(outcome_of(job))) for job in jobs]
    writes += [asyncio.create_task(work_queues[1].put(item_id, b"")) for item_id in ids]
    while len(done) < 50:
        await asyncio.sleep(0.005)
    await crash(own_nats)
    await asyncio.gather(*writes)
    await asyncio.wait_for(all_done.wait(), 60)
    await cancel(*consumers)


async def test_taking_begins_before_there_is_anything_to_take_from(
    world: World, own_nats: Server, eventually: Eventually
) -> None:
    """Somebody deletes the consumer: it is created again, and consumption goes on; an idle consumer polls rarely."""
    log = await world.gateway()
    job = new_job()
    async with aclosing(log.consume_outcomes(max_unacked=2, ack_wait_s=30)) as outcomes:
        consuming = asyncio.create_task(anext(outcomes))
        admin = NatsConnection(own_nats.url, "admin")
        await admin.connect()

        async def there() -> bool:
            """With a pull that waits there: one that is still on its way when the consumer goes may be lost silently."""
            try:
                consumer = await request(admin, f"CONSUMER.INFO.{OUTCOMES_STREAM}.recorder")
            except JetStreamError:
                return False
            return bool(consumer["num_waiting"])

        await eventually(there)
        await request(admin, f"CONSUMER.DELETE.{OUTCOMES_STREAM}.recorder")
        await eventually(there)
        await log.store_outcome(outcome_of(job))
        item: WorkItem = await asyncio.wait_for(consuming, 20)
        assert item.id == job
        await item.ack()
        await admin.close()


# Streams


async def test_streams_of_an_earlier_version_are_brought_up_to_date(world: World, own_nats: Server) -> None:
    """A gateway with other settings changes retention and `ack_wait_s`; it creates nothing again."""
    log, job = await world.gateway(), new_job()
    await log.append_event(job, b"kept")
    async with aclosing(log.work_queue("hooks").consume(max_unacked=1, ack_wait_s=60)) as items:
        await log.work_queue("hooks").put("a", b"1")
        (await next_of(items)).nak(0)
    world.kept = Retention(events_s=60, max_event_bytes=2 * MIB, max_outcome_bytes=MIB, max_dead_letter_bytes=MIB)
    other = await world.gateway()
    assert [event.data for event in await other.first_events(job, 5)] == [b"kept"]
    async with aclosing(other.work_queue("hooks").consume(max_unacked=1, ack_wait_s=7)) as items:
        await (await next_of(items)).ack()
    admin = NatsConnection(own_nats.url, "admin")
    await admin.connect()
    stream = await request(admin, f"STREAM.INFO.{EVENTS_STREAM}")
    assert (stream["config"]["max_age"], stream["config"]["max_bytes"]) == (60 * 10**9, 2 * MIB)
    consumer = await request(admin, "CONSUMER.INFO.NEXUS_HOOKS.gateways")
    assert consumer["config"]["ack_wait"] == 7 * 10**9
    await admin.close()


async def test_claims_are_read_by_natss_own_clients(world: World, own_nats: Server) -> None:
    """`nats kv get nexus-idempotency` shows claims, and one that was deleted there can be made again."""
    log = await world.gateway()
    assert await log.claim("key", b"job_1") == b"job_1"
    client = await nats.connect(own_nats.url)
    bucket = await client.jetstream().key_value("nexus-idempotency")
    assert (await bucket.get("key")).value == b"job_1"
    await bucket.delete("key")
    assert await log.claim("key", b"job_2") == b"job_2"
    assert await log.claim("key", b"job_3") == b"job_2"
    await bucket.purge("key")
    assert await log.claim("key", b"job_4") == b"job_4"
    await client.close()


async def test_a_full_stream_of_outcomes_is_unavailable(world: World) -> None:
    """There is no room for how a job ended: that is an error to be seen to, not the news that it had ended before."""
    world.kept = Retention(max_event_bytes=MIB, max_outcome_bytes=64 * 1024, max_dead_letter_bytes=MIB)
    log, job = await world.gateway(), new_job()
    assert await log.store_outcome(outcome_of(job), b"x" * 50_000)
    other = new_job()
    with pytest.raises(Unavailable):
        await log.store_outcome(outcome_of(other), b"x" * 50_000)
    assert await log.read_outcome(other) is None
    assert not await log.store_outcome(outcome_of(job), b"x" * 50_000)


async def test_the_oldest_recorded_outcomes_make_room(world: World, eventually: Eventually) -> None:
    """Jobs go on ending, however large their answers are: those that ended long ago lose theirs, and none that nobody has
    recorded yet.
    """
    world.kept = Retention(max_event_bytes=MIB, max_outcome_bytes=MIB, max_dead_letter_bytes=MIB)
    log, payload = await world.gateway(), b"x" * 200_000
    jobs = [new_job() for _ in range(10)]

    async def decide(job: str) -> bool:
        try:
            return await log.store_outcome(outcome_of(job), payload)
        except Unavailable:
            return False

    assert all([await log.store_outcome(outcome_of(job), payload) for job in jobs[:5]])
    assert not await decide(jobs[5])
    async with aclosing(log.consume_outcomes(max_unacked=100, ack_wait_s=30)) as outcomes:
        for job in jobs[5:]:
            await (await next_of(outcomes)).ack()
            await eventually(lambda job=job: decide(job), timeout_s=20)
        assert await log.read_outcome(jobs[-1]) is not None
        assert await log.read_outcome(jobs[0]) is None


async def test_the_rpc_server_answers_many_requests_and_ends_with_its_gateway(
    world: World, eventually: Eventually
) -> None:
    """A thousand questions at once are all answered, a bounded number at a time; a stopped gateway leaves none running."""
    log, worker = await world.gateway(), await world.worker()
    max_unacked, most, answers = 0, 0, list[GateReply | None]()

    async def gate(_ask: GateRequest) -> GateReply | None:
        nonlocal max_unacked, most
        max_unacked += 1
        most = max(most, max_unacked)
        try:
            await asyncio.sleep(0.01)
        finally:
            max_unacked -= 1
        return GateReply(kind=GateVerdict.PROCEED)

    await log.serve_gate_requests(gate)
    ask = GateRequest(kind=FrameKind.HEARTBEAT, job=new_job(), run=1, delivery=1, token="t", owner="o", worker="w")
    for _ in range(1000):
        worker.request_gate(ask, answers.append)
    await eventually(lambda: len(answers) == 1000)
    assert all(answer is not None for answer in answers)
    assert most <= 256
    for _ in range(10):
        worker.request_gate(ask, answers.append)
    await log.close()
    assert max_unacked == 0


async def test_who_has_asked_is_answered_by_a_gateway_that_ends(world: World, eventually: Eventually) -> None:
    """A gateway that closes answers what it was asked before, so that no worker waits for nothing; then it hears no more."""
    log, worker = await world.gateway(), await world.worker()
    asked, go = asyncio.Event(), asyncio.Event()
    answers: list[GateReply | None] = []

    async def gate(_ask: GateRequest) -> GateReply | None:
        asked.set()
        await go.wait()
        return GateReply(kind=GateVerdict.PROCEED)

    await log.serve_gate_requests(gate)
    ask = GateRequest(kind=FrameKind.STARTED, job=new_job(), run=1, delivery=1, token="t", owner="o", worker="w")
    worker.request_gate(ask, answers.append)
    await asked.wait()
    asyncio.get_running_loop().call_later(0.2, go.set)
    await log.close()
    await eventually(lambda: answers == [GateReply(kind=GateVerdict.PROCEED)])
    worker.request_gate(ask, answers.append)
    await eventually(lambda: answers[1:] == [None])


def _quiet(_: JobLog) -> None:
    """Keeps the protocol honest: NatsJobLog is one."""


def test_the_implementation_fits_the_protocol() -> None:
    _quiet(NatsJobLog("nats://127.0.0.1:1", "g", retention=SMALL))
