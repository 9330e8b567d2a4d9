"""Owners share a queue by their weights, on memory and on a real nats-server alike."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from backbone.bus.bus import GatewayBus, JobDelivery, Queue
from backbone.bus.fair_share import FairShare
from backbone.bus.job_log import JobLog
from backbone.bus.nats import backlog_releaser
from backbone.bus.nats.backlogs import Backlogs
from backbone.bus.nats.gateway_bus import NatsGatewayBus
from backbone.bus.nats.jetstream import JobsStreamConfig
from backbone.bus.nats.job_log import NatsJobLog
from backbone.bus.nats.worker_bus import NatsWorkerBus
from backbone.bus.subjects import BACKLOG_STREAM, stream_of_job
from backbone.testing.bus import MemoryBroker, MemoryGatewayBus, MemoryWorkerBus
from backbone.testing.job_log import MemoryJobLog
from schemas.errors import QueueFull, Unavailable
from schemas.jobs import Capability, Envelope, Lane
from tests.backbone.job_logs import SMALL
from tests.backbone.test_bus import Ear
from tests.conftest import Eventually
from tests.servers import source

ACK_WAIT_S = 2.0
MAX_PER_QUEUE = 250
WEIGHTS = {"heavy": 3.0}


class Side:
    """One gateway."""

    def __init__(self, bus: GatewayBus, log: JobLog) -> None:
        self.bus = bus
        self.log = log
        self.ears: dict[str, Ear] = {}

    async def close(self) -> None:
        await self.log.close()
        await self.bus.close()


class World:
    """One broker, gateways with one slot in view, and a worker with one slot."""

    def __init__(self, nats_url: str | None) -> None:
        self.nats_url = nats_url
        self.broker = MemoryBroker(ack_wait_s=ACK_WAIT_S, max_per_queue=MAX_PER_QUEUE, weights=dict(WEIGHTS))
        self.queue = Queue(Capability.CHAT, Lane.DEFAULT, f"model.{secrets.token_hex(4)} *>")
        self.sides: list[Any] = []
        self.jobs: list[JobDelivery] = []
        self._worker: Any = None
        self._pulls = 0

    async def gateway(self) -> Side:
        name = secrets.token_hex(4)
        backlogs = Backlogs(FairShare(lambda owner: WEIGHTS.get(owner, 1.0)))
        stream = JobsStreamConfig(max_per_queue=MAX_PER_QUEUE, max_bytes=64 * 1024 * 1024)
        side = (
            Side(
                NatsGatewayBus(self.nats_url, gateway=name, ack_wait_s=ACK_WAIT_S, stream=stream, backlogs=backlogs),
                NatsJobLog(self.nats_url, name, retention=SMALL, backlogs=backlogs),
            )
            if self.nats_url
            else Side(MemoryGatewayBus(self.broker), MemoryJobLog(self.broker))
        )
        await side.bus.start()
        await side.log.start()
        await side.bus.open_queue(self.queue)
        self.sides.append(side)
        return side

    def envelope(self, side: Side, owner: str, **fields: Any) -> Envelope:
        return Envelope(
            job=f"job_{secrets.token_hex(16)}",
            endpoint="/v1/chat/completions",
            capability=self.queue.capability,
            lane=self.queue.lane,
            model=self.queue.model,
            public_model=self.queue.model,
            reply=side.bus.new_reply_subject(),
            owner=owner,
            **fields,
        )

    async def submit(self, side: Side, owner: str, count: int, eventually: Eventually) -> list[Envelope]:
        """Store synchronous jobs in order."""
        envelopes = [self.envelope(side, owner, metadata={"number": str(number)}) for number in range(count)]
        for envelope in envelopes:
            ear = side.ears[envelope.reply] = Ear()
            side.bus.submit(envelope, b"{}", ear)
        await eventually(lambda: all(side.ears[one.reply].seq or side.ears[one.reply].error for one in envelopes))
        return envelopes

    async def next_job(self, eventually: Eventually) -> tuple[Envelope, JobDelivery]:
        """The job that a worker's free slot gets."""
        if self._worker is None:
            self._worker = (
                NatsWorkerBus(
                    self.nats_url, worker=secrets.token_hex(4), ack_wait_s=ACK_WAIT_S, on_job=self.jobs.append
                )
                if self.nats_url
                else MemoryWorkerBus(self.broker, self.jobs.append)
            )
            await self._worker.start()
            await self._worker.serve([self.queue], None)

        def arrived() -> bool:
            if not self.jobs and not self._pulls:
                self._pulls += 1
                self._worker.pull(self.queue, 1, 0.2, self._on_end)
            return bool(self.jobs)

        await eventually(arrived, timeout_s=30)
        self._pulls = 0
        job = self.jobs.pop()
        return Envelope.decode(job.message)[0], job

    def _on_end(self, _queue: Queue, _unused: int) -> None:
        self._pulls = 0

    async def run(self, count: int, eventually: Eventually, *, record: bool = True) -> list[Envelope]:
        """Run jobs one after another, and return them in the order in which they started. `record`: what they take counts."""
        started = []
        for _ in range(count):
            envelope, job = await self.next_job(eventually)
            started.append(envelope)
            job.ack()
            for side in self.sides:
                side.bus.record_start(self.queue)
                if record:
                    side.bus.release(envelope.reply)
        return started

    async def close(self) -> None:
        if self._worker is not None:
            await self._worker.close()
        for side in self.sides:
            await side.close()


@pytest.fixture(autouse=True)
def slow_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs of these tests take no time, so that many of them would be moved ahead."""
    monkeypatch.setattr(backlog_releaser, "AHEAD_S", 0.0)


@pytest.fixture(scope="module")
def fair_nats(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.conftest import running

    yield from running(source().nats(tmp_path_factory.mktemp("fair-nats")))


@pytest.fixture(params=["memory", "nats"])
def broker_url(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("fair_nats").url if request.param == "nats" else None


@pytest.fixture
async def world(broker_url: str | None) -> AsyncIterator[World]:
    made = World(broker_url)
    yield made
    await made.close()


@pytest.fixture
def nats_url(fair_nats: Any) -> str:
    return str(fair_nats.url)


@pytest.fixture
async def nats_world(nats_url: str) -> AsyncIterator[World]:
    made = World(nats_url)
    yield made
    await made.close()


def owners(envelopes: list[Envelope]) -> list[str]:
    return [envelope.owner for envelope in envelopes]


async def is_empty(world: World, side: Side) -> bool:
    """Whether no job waits, neither in the queue nor in a backlog."""
    return not any(depth.queue == world.queue for depth in await side.bus.queue_depths())


async def test_one_job_beside_two_hundred(world: World, eventually: Eventually) -> None:
    """The single job of one owner starts within two jobs, although two hundred of another owner came first, which stay in order."""
    side = await world.gateway()
    many = await world.submit(side, "many", 200, eventually)
    await world.run(3, eventually)
    await world.submit(side, "one", 1, eventually)
    started = await world.run(10, eventually)
    assert "one" in owners(started)[:3]
    rest = await world.run(188, eventually)
    assert [one.job for one in (*started, *rest) if one.owner == "many"] == [one.job for one in many[3:]]


async def test_weights(world: World, eventually: Eventually) -> None:
    """An owner of weight 3 gets three of four starts beside one of weight 1."""
    side = await world.gateway()
    await world.submit(side, "light", 60, eventually)
    await world.submit(side, "heavy", 60, eventually)
    await world.run(4, eventually)
    assert Counter(owners(await world.run(40, eventually)))["heavy"] == pytest.approx(30, abs=3)


async def test_durable_and_synchronous_jobs(world: World, eventually: Eventually) -> None:
    """Both kinds wait in one line. A position is the place in the order of the starts, and cancelled jobs never start."""
    side = await world.gateway()
    jobs = [world.envelope(side, owner, durable=True) for owner in ("batch",) * 20 + ("heavy",) * 10]
    seqs = {one.job: await side.log.enqueue(one, b"{}") for one in jobs}
    calls = await world.submit(side, "caller", 5, eventually)
    seqs |= {one.job: side.ears[one.reply].seq or 0 for one in calls}
    await side.log.delete_job(world.queue, seqs[jobs[10].job], jobs[10].job, 1)
    side.bus.delete_job(seqs[calls[3].job])

    async def position(job: str) -> int | None:
        return await side.bus.queue_position(world.queue, seqs[job])

    async def is_deleted() -> bool:
        return [await position(one.job) for one in (jobs[10], calls[3])] == [None, None]

    await eventually(is_deleted)
    told = {job: await position(job) for job in seqs}
    started = [one.job for one in await world.run(33, eventually, record=False)]
    assert len(set(started)) == 33
    assert not {jobs[10].job, calls[3].job} & set(started)
    # One job has moved into the queue, under another sequence.
    assert [told[job] for job in started if told[job] is not None] == [
        place for place, job in enumerate(started) if told[job] is not None
    ]
    assert list(told.values()).count(None) <= 3


async def test_a_returned_job_comes_again(world: World, eventually: Eventually) -> None:
    """A job that a worker gives back is delivered again, and counts as delivered twice."""
    side = await world.gateway()
    await world.submit(side, "a", 10, eventually)
    envelope, job = await world.next_job(eventually)
    job.nak()
    for _ in range(3):
        again, job = await world.next_job(eventually)
        job.ack()
        if again.job == envelope.job:
            break
    assert (again.job, job.delivery) == (envelope.job, 2)


async def test_each_owner_has_its_own_bound(world: World, eventually: Eventually) -> None:
    """An owner whose jobs fill the queue's bound is refused."""
    side = await world.gateway()
    ears = [side.ears[one.reply] for one in await world.submit(side, "many", MAX_PER_QUEUE + 10, eventually)]
    refused = [ear for ear in ears if ear.error is not None]
    assert len(refused) in (9, 10)
    assert isinstance(refused[-1].error, QueueFull)


async def test_other_owners_of_a_full_queue(nats_world: World, eventually: Eventually) -> None:
    """An owner at its bound keeps no other owner out."""
    side = await nats_world.gateway()
    await nats_world.submit(side, "many", MAX_PER_QUEUE + 10, eventually)
    (one,) = await nats_world.submit(side, "one", 1, eventually)
    assert side.ears[one.reply].error is None
    assert "one" in owners(await nats_world.run(3, eventually))


async def test_a_gateway_dies_between_store_and_delete(
    nats_world: World, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway that moves jobs is lost after it stored one in the queue and before it deleted it from the backlog: another
    one goes on, and every job of an owner starts once, in order.
    """
    first = await nats_world.gateway()
    jobs = [nats_world.envelope(first, "a", durable=True) for _ in range(30)]
    for one in jobs:
        await first.log.enqueue(one, b"{}")
    started = await nats_world.run(5, eventually)
    assert isinstance(first.bus, NatsGatewayBus)
    stuck = asyncio.Event()

    async def never(_seq: int) -> bool:
        stuck.set()
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(first.bus._releaser._jobs, "delete", never)
    started += await nats_world.run(1, eventually)
    await eventually(stuck.is_set)
    second = await nats_world.gateway()
    nats_world.sides.remove(first)
    await first.close()
    started += await nats_world.run(24, eventually)
    assert [one.job for one in started] == [one.job for one in jobs]

    await eventually(lambda: is_empty(nats_world, second))


async def test_a_move_whose_delete_fails(
    nats_world: World, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS is away after a job was stored in the queue: it starts once, and leaves the backlog when NATS is back."""
    gateway = await nats_world.gateway()
    assert isinstance(gateway.bus, NatsGatewayBus)
    jobs = [nats_world.envelope(gateway, "a", durable=True) for _ in range(12)]
    for one in jobs:
        await gateway.log.enqueue(one, b"{}")
    delete, failed = gateway.bus._releaser._jobs.delete, asyncio.Event()

    async def fail_once(seq: int) -> bool:
        if not failed.is_set():
            failed.set()
            raise Unavailable("NATS is away")
        return await delete(seq)

    monkeypatch.setattr(gateway.bus._releaser._jobs, "delete", fail_once)
    started = await nats_world.run(12, eventually)
    assert failed.is_set()
    assert [one.job for one in started] == [one.job for one in jobs]

    await eventually(lambda: is_empty(nats_world, gateway))


async def test_a_caller_leaves_while_its_job_moves(
    nats_world: World, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gateway deletes the job where it waited; where it was moved to, nothing is left."""
    gateway = await nats_world.gateway()
    assert isinstance(gateway.bus, NatsGatewayBus)
    move, moving, may_move = gateway.bus._releaser._move, asyncio.Event(), asyncio.Event()

    async def move_later(*job: Any) -> None:
        moving.set()
        await may_move.wait()
        await move(*job)

    monkeypatch.setattr(gateway.bus._releaser, "_move", move_later)
    _, leaving = await nats_world.submit(gateway, "a", 2, eventually)
    await nats_world.run(1, eventually)
    await eventually(moving.is_set)
    gateway.bus.delete_job(gateway.ears[leaving.reply].seq or 0)
    gateway.bus.release(leaving.reply)
    await gateway.bus.ping()
    may_move.set()
    await eventually(lambda: is_empty(nats_world, gateway))


async def test_a_job_is_deleted_after_it_has_moved(nats_world: World, eventually: Eventually) -> None:
    """The caller of `delete_job` knows only where the job waited before."""
    gateway = await nats_world.gateway()
    assert isinstance(gateway.bus, NatsGatewayBus)
    jobs = [nats_world.envelope(gateway, "a", durable=True) for _ in range(2)]
    seqs = [await gateway.log.enqueue(one, b"{}") for one in jobs]
    assert stream_of_job(seqs[1]) == BACKLOG_STREAM
    await nats_world.run(1, eventually)
    backlog = gateway.bus._backlogs.of(nats_world.queue)
    await eventually(lambda: not backlog.order.total)
    await gateway.log.delete_job(nats_world.queue, seqs[1], jobs[1].job, 1)
    await eventually(lambda: is_empty(nats_world, gateway))


async def test_a_start_that_is_heard_late(nats_world: World, eventually: Eventually) -> None:
    """The notice of a start comes after the queue was measured without that job: still one job is ahead for one slot."""
    gateway = await nats_world.gateway()
    assert isinstance(gateway.bus, NatsGatewayBus)
    await nats_world.submit(gateway, "many", 6, eventually)
    backlog = gateway.bus._backlogs.of(nats_world.queue)
    backlog.order.record_use("many", 1.0)
    await nats_world.next_job(eventually)
    await eventually(lambda: backlog.order.total == 4)
    for _ in range(2):  # the second is looked at once the first has had its effect
        gateway.bus.record_start(nats_world.queue)
        await eventually(lambda: not backlog.started)
    assert backlog.order.total == 4


async def test_two_gateways(nats_world: World, eventually: Eventually) -> None:
    """Owners share a queue over gateways; a moved job's gateway knows its new sequence, and each job starts once."""
    one, other = await nats_world.gateway(), await nats_world.gateway()
    many = await nats_world.submit(one, "many", 60, eventually)
    few = await nats_world.submit(other, "few", 6, eventually)
    assert [stream_of_job(other.ears[job.reply].seq or 0) for job in few[1:]] == [BACKLOG_STREAM] * 5
    started = await nats_world.run(20, eventually)
    assert owners(started).count("few") == 6
    started += await nats_world.run(46, eventually)
    assert Counter(job.job for job in started) == Counter(job.job for job in (*many, *few))
