"""Queues are made when they are used, and freed when their model is gone; no job is lost on the way. On a real nats-server."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import pytest
from nats.aio.transport import TcpTransport

from backbone.bus.bus import JobDelivery, Queue, QueueChange
from backbone.bus.nats import queue_consumers
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.gateway_bus import NatsGatewayBus
from backbone.bus.nats.jetstream import JobsStreamConfig
from backbone.bus.nats.worker_bus import NatsWorkerBus
from backbone.bus.subjects import JOBS_STREAM, consumer_name
from schemas.errors import InvalidRequest, NexusError, Unavailable
from schemas.jobs import LANES, Capability, Envelope, Lane
from tests.conftest import Eventually
from tests.jetstream import request

ROOM = 10
ACK_WAIT_S = 2.0


def queue(name: str, lane: Lane = Lane.DEFAULT) -> Queue:
    return Queue(Capability.CHAT, lane, name)


class Ear:
    def __init__(self) -> None:
        self.seq: int | None = None
        self.error: NexusError | None = None
        self.is_waiting = True
        self.started_at: float | None = None

    def on_stored(self, seq: int) -> None:
        self.seq = seq

    def on_refused(self, error: NexusError) -> None:
        self.error = error

    def on_event(self, _data: bytes) -> bytes | None:
        return None

    @property
    def settled(self) -> bool:
        return self.seq is not None or self.error is not None


class World:
    """One server, any number of gateways and workers."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.closing: list[Any] = []
        self.changes: list[QueueChange] = []
        self.admin = NatsConnection(url, "admin")

    async def gateway(self, **bounds: Any) -> NatsGatewayBus:
        stream = JobsStreamConfig(**({"max_queues": ROOM, "max_bytes": 64 * 1024 * 1024} | bounds))
        bus = NatsGatewayBus(self.url, gateway=secrets.token_hex(4), ack_wait_s=ACK_WAIT_S, stream=stream)
        bus.on_queue_change(self.changes.append)
        await bus.start()
        self.closing.append(bus)
        return bus

    async def worker(self, queues: list[Queue], on_job: Any, on_again: Any = None) -> NatsWorkerBus:
        bus = NatsWorkerBus(self.url, worker=secrets.token_hex(4), ack_wait_s=ACK_WAIT_S, on_job=on_job)
        await bus.start()
        self.closing.append(bus)
        await bus.serve(queues, lambda _: None, on_again)
        return bus

    async def names(self) -> set[str]:
        return set((await request(self.admin, f"CONSUMER.NAMES.{JOBS_STREAM}", {"offset": 0}))["consumers"])

    async def delete(self, one: Queue) -> None:
        await request(self.admin, f"CONSUMER.DELETE.{JOBS_STREAM}.{consumer_name(*one)}")


def submit(bus: NatsGatewayBus, to: Queue) -> tuple[str, Ear]:
    job, ear = f"job_{secrets.token_hex(16)}", Ear()
    envelope = Envelope(
        job=job, request_id="r", endpoint="/", capability=to.capability, lane=to.lane, model=to.model,
        public_model=to.model, reply=bus.new_reply_subject(),
    )  # fmt: skip
    bus.submit(envelope, b"{}", ear)
    return job, ear


@pytest.fixture
async def world(own_nats: Any) -> AsyncIterator[World]:
    made = World(own_nats.url)
    await made.admin.connect()
    yield made
    for bus in reversed(made.closing):
        await bus.close()
    await made.admin.close()


async def fill(gateway: NatsGatewayBus, count: int = ROOM) -> list[Queue]:
    """Use as many queues as there may be; each holds a job."""
    queues = [queue(f"full-{number}") for number in range(count)]
    ears = [submit(gateway, one)[1] for one in queues]
    while not all(ear.settled for ear in ears):
        await asyncio.sleep(0.01)
    assert not any(ear.error for ear in ears)
    return queues


async def test_the_first_job_makes_its_queue_and_no_other(world: World, eventually: Eventually) -> None:
    """Nothing exists for models that are only listed; both gateways use the one queue that a job has made."""
    one, other = await world.gateway(), await world.gateway()
    assert await world.names() == set()
    ears = [submit(gateway, queue("a"))[1] for gateway in (one, other, one)]
    await eventually(lambda: all(ear.seq for ear in ears))
    assert await world.names() == {"chat_default_a"}
    ears = [submit(one, queue("a", Lane.FLEX))[1]]
    await eventually(lambda: all(ear.seq for ear in ears))
    assert await world.names() == {"chat_default_a", "chat_flex_a"}
    jobs: list[JobDelivery] = []
    worker = await world.worker([queue("a")], jobs.append)
    worker.pull(queue("a"), 3, 5.0, lambda *_: None)
    await eventually(lambda: len(jobs) == 3)


async def test_without_room_a_job_is_refused_at_once(world: World, eventually: Eventually) -> None:
    """The error says why and when to come back; queues that exist are used on; there is room again once one is freed."""
    gateway = await world.gateway()
    queues = await fill(gateway)
    for lane in LANES:
        began = monotonic()
        _, ear = submit(gateway, queue("late", lane))
        await eventually(lambda ear=ear: ear.settled)
        assert monotonic() - began < 5.0
        assert isinstance(ear.error, Unavailable)
        assert ear.error.info.code == "no_queue"
        assert (ear.error.info.status, ear.error.info.retry_after_s) == (503, queue_consumers.RETRY_AFTER_S)
    with pytest.raises(Unavailable, match="MAX_QUEUES"):
        await gateway.open_queue(queue("late"))
    assert gateway.queues_are_full
    assert gateway.is_queue_refused(queue("late"))
    assert not gateway.is_queue_refused(queues[0])
    _, ear = submit(gateway, queues[0])
    await eventually(lambda: ear.seq)
    await request(world.admin, f"STREAM.PURGE.{JOBS_STREAM}", {})
    assert await gateway.free_queues(lambda one: one != queues[0], 0.0) == 1
    await eventually(lambda: not gateway.queues_are_full)
    _, ear = submit(gateway, queue("late"))
    await eventually(lambda: ear.seq)
    assert world.changes.count(QueueChange.REFUSED) >= 4


async def test_an_idle_queue_makes_room(world: World, eventually: Eventually, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room, queues that are empty and unused go first, also those of models that are served."""
    gateway = await world.gateway()
    queues = await fill(gateway, ROOM - 1)
    await gateway.open_queue(queue("idle"))
    monkeypatch.setattr(queue_consumers, "MIN_EVICTED_IDLE_S", -1.0)
    _, ear = submit(gateway, queue("late"))
    await eventually(lambda: ear.seq)
    assert await world.names() == {consumer_name(*one) for one in [*queues, queue("late")]}


async def test_what_becomes_idle_later_makes_room(
    world: World, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal does not last: as many queues as before may be there, and some of them unused by now."""
    monkeypatch.setattr(queue_consumers, "REFUSED_RETRY_INTERVAL_S", 3.0)
    gateway = await world.gateway()
    await fill(gateway)
    with pytest.raises(Unavailable):
        await gateway.open_queue(queue("late"))
    await request(world.admin, f"STREAM.PURGE.{JOBS_STREAM}", {})
    monkeypatch.setattr(queue_consumers, "MIN_EVICTED_IDLE_S", -1.0)
    await eventually(lambda: not gateway.queues_are_full)
    _, ear = submit(gateway, queue("late"))
    await eventually(lambda: ear.seq)


async def test_a_higher_limit_makes_room(world: World, eventually: Eventually, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator raises it; gateways that know of the refusal need no restart."""
    monkeypatch.setattr(queue_consumers, "REFUSED_RETRY_INTERVAL_S", 3.0)
    gateway = await world.gateway()
    await fill(gateway)
    with pytest.raises(Unavailable):
        await gateway.open_queue(queue("late"))
    await world.gateway(max_queues=ROOM + 1)
    await eventually(lambda: not gateway.queues_are_full)
    _, ear = submit(gateway, queue("late"))
    await eventually(lambda: ear.seq)


async def test_what_is_gone_and_empty_is_freed(world: World, eventually: Eventually) -> None:
    """After the grace time, and not before; never a queue with a job that waits or is in a worker's hands."""
    gateway = await world.gateway()
    for name in ("empty", "waiting", "running", "served"):
        await gateway.open_queue(queue(name))
    ears = [submit(gateway, queue(name))[1] for name in ("waiting", "running")]
    await eventually(lambda: all(ear.seq for ear in ears))
    jobs: list[JobDelivery] = []
    worker = await world.worker([queue("running")], jobs.append)
    worker.pull(queue("running"), 1, 5.0, lambda *_: None)
    await eventually(lambda: jobs)

    def served(one: Queue) -> bool:
        return one.model == "served"

    assert await gateway.free_queues(served, 60.0) == 0
    assert await gateway.free_queues(served, 0.0) == 1
    assert await world.names() == {f"chat_default_{name}" for name in ("waiting", "running", "served")}
    jobs[0].ack()

    async def freed() -> int:
        return await gateway.free_queues(served, 0.0)

    await eventually(freed)
    assert await world.names() == {"chat_default_waiting", "chat_default_served"}


async def test_consumers_of_others_are_left_alone(world: World) -> None:
    """A consumer that is no queue's is neither counted nor freed."""
    gateway = await world.gateway()
    config = {"durable_name": "mine", "filter_subject": "nexus.jobs.chat.default.x.y", "ack_policy": "explicit"}
    body = {"stream_name": JOBS_STREAM, "config": config}
    await request(world.admin, f"CONSUMER.DURABLE.CREATE.{JOBS_STREAM}.mine", body)
    assert await gateway.free_queues(lambda _: False, 0.0) == 0
    assert await world.names() == {"mine"}


@pytest.mark.parametrize("heard", [True, False])
async def test_a_job_of_a_queue_that_was_just_freed_is_served(
    world: World, eventually: Eventually, heard: bool
) -> None:
    """The gateway makes the queue again and wakes the workers, also where it did not hear that it was freed."""
    gateway = await world.gateway()
    jobs: list[JobDelivery] = []
    again: list[Queue] = []
    worker = await world.worker([queue("a")], jobs.append, again.append)
    await gateway.open_queue(queue("a"))
    existing, subject = gateway._consumers.existing, b"nexus.jobs.chat.default.a"
    await world.delete(queue("a"))
    await eventually(lambda: subject not in existing)
    existing.add(subject)  # it has not heard of it yet, or never does
    _, ear = submit(gateway, queue("a"))
    if heard:
        existing.discard(subject)
    await eventually(lambda: ear.seq)
    if not heard:
        await gateway.queue_depths()

    async def taken() -> bool:
        if again:
            again.clear()
            worker.pull(queue("a"), 1, 0.5, lambda *_: None)
        return bool(jobs)

    await eventually(taken)


async def test_jobs_that_came_without_a_queue_are_found(world: World, eventually: Eventually) -> None:
    """As after a restore, or when the gateway that submitted them was killed: another one makes the queue."""
    first = await world.gateway()
    _, ear = submit(first, queue("left"))
    await eventually(lambda: ear.seq)
    await first.close()
    await world.delete(queue("left"))
    await world.gateway()

    async def made() -> bool:
        return "chat_default_left" in await world.names()

    await eventually(made)


async def test_workers_are_told_of_a_job_that_comes_again(world: World, eventually: Eventually) -> None:
    """NATS wakes nobody then; a gateway does, within about a second."""
    gateway = await world.gateway()
    jobs: list[JobDelivery] = []
    again: list[Queue] = []
    dead = await world.worker([queue("a")], lambda _: None)
    worker = await world.worker([queue("a")], jobs.append, again.append)
    _, ear = submit(gateway, queue("a"))
    await eventually(lambda: ear.seq)
    dead.pull(queue("a"), 1, 2.0, lambda *_: None)
    await eventually(lambda: again)

    async def taken() -> bool:
        worker.pull(queue("a"), 1, 0.0, lambda *_: None)
        await asyncio.sleep(0.1)
        return bool(jobs)

    await eventually(taken)
    assert jobs[0].delivery == 2


async def test_a_stream_without_the_bound_gets_it(world: World) -> None:
    """One that was made before the bound was known would hold nats-server's default of 1,000."""
    config = JobsStreamConfig(max_bytes=64 * 1024 * 1024).config() | {"max_consumers": -1}
    await request(world.admin, f"STREAM.CREATE.{JOBS_STREAM}", config)
    await world.gateway(max_queues=5000)
    info = await request(world.admin, f"STREAM.INFO.{JOBS_STREAM}")
    assert info["config"]["max_consumers"] == 5000


async def test_a_name_that_no_queue_can_have(world: World) -> None:
    """It is the request that is wrong, not NATS."""
    gateway = await world.gateway()
    with pytest.raises(InvalidRequest):
        await gateway.open_queue(queue("x" * 300))


@pytest.mark.parametrize("seed", range(4))
async def test_no_job_is_lost_to_freeing(world: World, eventually: Eventually, seed: int) -> None:
    """Two gateways submit and free the same queues all the time, a third is killed in between: every stored job arrives."""
    chance = random.Random(seed)
    gateways = [await world.gateway() for _ in range(3)]
    queues = [queue(f"race-{number}") for number in range(3)]
    arrived: set[str] = set()
    rung: list[Queue] = []

    def on_job(job: JobDelivery) -> None:
        arrived.add(Envelope.decode(job.message)[0].job)
        job.ack()

    worker = await world.worker(queues, on_job, rung.append)
    stored: dict[str, Ear] = {}

    async def pull() -> None:
        while True:
            for one in queues:
                worker.pull(one, 8, 0.0, lambda *_: None)
            await asyncio.sleep(0.02)

    async def free(gateway: NatsGatewayBus) -> None:
        while True:
            await gateway.free_queues(lambda _: False, 0.0)
            await asyncio.sleep(chance.random() * 0.004)

    tasks = [asyncio.create_task(work) for work in (pull(), free(gateways[0]), free(gateways[1]))]
    for number in range(300):
        gateway = gateways[chance.randrange(len(gateways))]
        job, ear = submit(gateway, chance.choice(queues))
        stored[job] = ear
        if number == 150:
            killed = gateways.pop()
            transport = killed._connection.client._transport
            assert isinstance(transport, TcpTransport)
            assert transport._io_writer is not None
            transport._io_writer.transport.abort()
            await killed.close()
        if chance.random() < 0.5:
            await asyncio.sleep(chance.random() * 0.01)
    for task in tasks[1:]:
        task.cancel()
    await eventually(lambda: all(job in arrived for job, ear in stored.items() if ear.seq is not None))
    alive = [ear for ear in stored.values() if ear.seq is not None]
    assert len(alive) >= 200
    await asyncio.sleep(0)
    tasks[0].cancel()
    assert world.changes.count(QueueChange.FREED) > 10
