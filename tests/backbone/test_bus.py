"""The bus's guarantees, on memory and on a real nats-server alike."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from backbone.bus.bus import GatewayBus, JobDelivery, Queue, WorkerBus
from backbone.bus.nats import gateway_bus
from backbone.bus.nats.gateway_bus import NatsGatewayBus
from backbone.bus.nats.jetstream import JobsStreamConfig
from backbone.bus.nats.worker_bus import NatsWorkerBus
from backbone.testing.bus import MemoryBroker, MemoryGatewayBus, MemoryWorkerBus
from schemas.errors import BackendFailed, NexusError, QueueFull, RequestTooLarge
from schemas.frames import PROCEED, STOP, FrameKind, encode_frame
from schemas.jobs import Capability, Envelope, Lane
from tests.conftest import Eventually
from tests.servers import Server, source

ACK_WAIT_S = 1.0
MAX_PER_QUEUE = 5


@dataclass
class Ear:
    """A sink that remembers."""

    seq: int | None = None
    error: NexusError | None = None
    frames: list[bytes] = field(default_factory=list)
    answer: bytes | None = PROCEED
    is_waiting: bool = True
    started_at: float | None = None

    def on_stored(self, seq: int) -> None:
        self.seq = seq

    def on_refused(self, error: NexusError) -> None:
        self.error = error

    def on_event(self, data: bytes) -> bytes | None:
        self.frames.append(data)
        return self.answer


@dataclass
class Hand:
    """A worker's bus, and what it was given."""

    bus: WorkerBus
    jobs: list[JobDelivery] = field(default_factory=list)
    unused: list[int] = field(default_factory=list)
    rang: list[Queue] = field(default_factory=list)

    def ended(self, _queue: Queue, unused: int) -> None:
        self.unused.append(unused)

    def pull(self, queue: Queue, batch: int = 1, wait_s: float = 5.0) -> None:
        self.bus.pull(queue, batch, wait_s, self.ended)


class World:
    """One broker, any number of sides."""

    def __init__(self, nats_url: str | None) -> None:
        self.nats_url = nats_url
        self.broker = MemoryBroker(ack_wait_s=ACK_WAIT_S, max_per_queue=MAX_PER_QUEUE)
        self.closing: list[Any] = []
        self.queue = Queue(Capability.CHAT, Lane.DEFAULT, f"model.{secrets.token_hex(4)} *>")

    async def gateway(self) -> GatewayBus:
        stream = JobsStreamConfig(max_per_queue=MAX_PER_QUEUE, max_bytes=64 * 1024 * 1024)
        bus: GatewayBus = (
            NatsGatewayBus(self.nats_url, gateway=secrets.token_hex(4), ack_wait_s=ACK_WAIT_S, stream=stream)
            if self.nats_url
            else MemoryGatewayBus(self.broker)
        )
        await bus.start()
        self.closing.append(bus)
        await bus.open_queue(self.queue)
        return bus

    async def worker(self, *, bell: bool = False) -> Hand:
        jobs: list[JobDelivery] = []
        bus: WorkerBus = (
            NatsWorkerBus(self.nats_url, worker=secrets.token_hex(4), ack_wait_s=ACK_WAIT_S, on_job=jobs.append)
            if self.nats_url
            else MemoryWorkerBus(self.broker, jobs.append)
        )
        await bus.start()
        self.closing.append(bus)
        hand = Hand(bus, jobs)
        await bus.serve([self.queue], hand.rang.append if bell else None)
        return hand

    def envelope(self, bus: GatewayBus, **fields: Any) -> Envelope:
        values = {
            "job": f"job_{secrets.token_hex(16)}",
            "request_id": "req_1",
            "endpoint": "/v1/chat/completions",
            "capability": self.queue.capability,
            "lane": self.queue.lane,
            "model": self.queue.model,
            "public_model": self.queue.model,
            "reply": bus.new_reply_subject(),
        }
        return Envelope(**(values | fields))

    def submit(self, bus: GatewayBus, body: bytes = b"{}", **fields: Any) -> tuple[Envelope, Ear]:
        envelope, ear = self.envelope(bus, **fields), Ear()
        bus.submit(envelope, body, ear)
        return envelope, ear


@pytest.fixture(scope="module")
def bus_nats(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.conftest import running

    yield from running(source().nats(tmp_path_factory.mktemp("bus-nats")))


@pytest.fixture(params=["memory", "nats"])
def broker_url(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("bus_nats").url if request.param == "nats" else None


@pytest.fixture
async def world(broker_url: str | None) -> AsyncIterator[World]:
    made = World(broker_url)
    yield made
    for bus in reversed(made.closing):
        await bus.close()


async def test_a_job_arrives_as_it_was_sent(world: World, eventually: Eventually) -> None:
    """Envelope and body reach the worker byte for byte, and the submitter learns that the job is durable."""
    gateway, hand = await world.gateway(), await world.worker()
    body = b'{"text": "\xc3\xa9\\n\n\x00 raw"}'
    envelope, ear = world.submit(gateway, body)
    await eventually(lambda: ear.seq is not None)
    hand.pull(world.queue)
    await eventually(lambda: hand.jobs)
    assert Envelope.decode(hand.jobs[0].message) == (envelope, body)
    assert (hand.jobs[0].delivery, hand.jobs[0].pending) == (1, 0)


@pytest.mark.parametrize("forged", [b'{"seq":7}', b'{"error":{"err_code":10077}}', b"{}"])
async def test_a_worker_cannot_confirm_a_job(bus_nats: Server, forged: bytes, eventually: Eventually) -> None:
    """Who has a job knows where its events go, and not where JetStream confirms it: a sequence of its choice is not believed."""
    world = World(bus_nats.url)
    gateway, hand = await world.gateway(), await world.worker()
    assert isinstance(gateway, NatsGatewayBus)
    envelope, ear = world.submit(gateway)
    gateway._on_reply(envelope.reply.encode(), b"", b"", forged)  # before JetStream's own, which comes in a later turn
    assert (ear.seq, ear.error) == (None, None)
    hand.bus.send_event(envelope.reply, forged)
    await eventually(lambda: ear.frames == [forged, forged])
    await eventually(lambda: ear.seq is not None)
    hand.pull(world.queue)
    await eventually(lambda: hand.jobs)
    gateway.delete_job(ear.seq or 0)
    hand.jobs[0].ack()
    assert ear.error is None
    for bus in reversed(world.closing):
        await bus.close()


async def test_jobs_keep_their_order(world: World, eventually: Eventually) -> None:
    """Jobs of one queue are delivered in the order they were stored, with the count of those behind them."""
    gateway, hand = await world.gateway(), await world.worker()
    ears = [world.submit(gateway, b"%d" % i)[1] for i in range(4)]
    await eventually(lambda: all(ear.seq is not None for ear in ears))
    hand.pull(world.queue, batch=4)
    await eventually(lambda: len(hand.jobs) == 4)
    assert [Envelope.decode(job.message)[1] for job in hand.jobs] == [b"0", b"1", b"2", b"3"]
    assert [job.pending for job in hand.jobs] == [3, 2, 1, 0]


async def test_the_same_run_is_stored_once(world: World, eventually: Eventually) -> None:
    """A submit that is repeated, because its confirmation was lost, does not make a second job."""
    gateway, hand = await world.gateway(), await world.worker()
    envelope, first = world.submit(gateway)
    await eventually(lambda: first.seq is not None)
    again = Ear()
    gateway.submit(envelope, b"{}", again)
    await eventually(lambda: again.seq is not None)
    assert again.seq == first.seq
    hand.pull(world.queue, batch=2, wait_s=0.3)
    await eventually(lambda: hand.unused)
    assert (len(hand.jobs), hand.unused) == (1, [1])


async def test_a_pull_that_finds_nothing_says_so(world: World, eventually: Eventually) -> None:
    """A pull without waiting ends at once with what it did not bring."""
    await world.gateway()
    hand = await world.worker()
    hand.pull(world.queue, batch=3, wait_s=0)
    await eventually(lambda: hand.unused)
    assert hand.unused == [3]


async def test_a_pull_without_waiting_brings_what_is_there(world: World, eventually: Eventually) -> None:
    """A pull without waiting brings the jobs there are, and tells the rest."""
    gateway, hand = await world.gateway(), await world.worker()
    _, ear = world.submit(gateway)
    await eventually(lambda: ear.seq is not None)
    hand.pull(world.queue, batch=3, wait_s=0)
    await eventually(lambda: hand.unused)
    assert (len(hand.jobs), hand.unused) == (1, [2])


async def test_a_lingering_pull_waits_for_a_job(world: World, eventually: Eventually) -> None:
    """A job that is stored while a pull is open goes there."""
    gateway, hand = await world.gateway(), await world.worker()
    hand.pull(world.queue, wait_s=10)
    world.submit(gateway)
    await eventually(lambda: hand.jobs)


async def test_gateways_hear_each_other(world: World, eventually: Eventually) -> None:
    """A message to all gateways reaches each one; a reply reaches the gateway that listens, also from a worker, until it does not."""
    first, second, hand = await world.gateway(), await world.gateway(), await world.worker()
    heard: list[bytes] = []
    replies: list[bytes] = []
    for bus in (first, second):
        await bus.subscribe_gateways("topic", heard.append)
    await first.ping()
    await second.ping()
    reply = first.new_reply_subject()
    first.listen(reply, replies.append)
    second.send_to_gateways("topic", b"all")
    second.send_reply(reply, b"gateway")
    hand.bus.send_event(reply, b"worker")
    await eventually(lambda: len(heard) == 2 and len(replies) == 2)
    assert (set(heard), set(replies)) == ({b"all"}, {b"gateway", b"worker"})
    first.release(reply)
    second.send_reply(reply, b"late")
    second.send_reply("nexus.control.worker", b"no reply subject")
    second.send_to_gateways("topic", b"last")
    await eventually(lambda: len(heard) == 4)
    assert len(replies) == 2


async def test_a_missing_queue_ends_the_pull(world: World, eventually: Eventually) -> None:
    """Pulling from a queue that no gateway has opened yet is not a job lost, nor a pull that never ends."""
    hand = await world.worker()
    nowhere = Queue(Capability.CHAT, Lane.FLEX, "nobody opened this")
    await hand.bus.serve([nowhere], None)
    hand.pull(nowhere, wait_s=0)
    await eventually(lambda: hand.unused)


async def test_an_unsettled_job_goes_to_another_worker(world: World, eventually: Eventually) -> None:
    """A worker that goes silent loses its job after `ack_wait`; what it says of it later changes nothing."""
    gateway, dead, alive = await world.gateway(), await world.worker(), await world.worker()
    world.submit(gateway)
    dead.pull(world.queue)
    await eventually(lambda: dead.jobs)
    alive.pull(world.queue, wait_s=10)
    await eventually(lambda: alive.jobs)
    assert alive.jobs[0].delivery == 2
    assert not dead.jobs[0].owned
    dead.jobs[0].ack()
    dead.jobs[0].nak()
    assert alive.jobs[0].owned
    depths = {d.queue: d for d in await gateway.queue_depths()}
    assert depths[world.queue].in_progress == 1


async def test_a_job_is_kept_by_extending(world: World, eventually: Eventually) -> None:
    """A job that runs longer than `ack_wait` stays with its worker while that says so."""
    gateway, hand, other = await world.gateway(), await world.worker(), await world.worker()
    world.submit(gateway)
    hand.pull(world.queue)
    await eventually(lambda: hand.jobs)
    other.pull(world.queue, wait_s=ACK_WAIT_S * 2)
    for _ in range(8):
        await asyncio.sleep(ACK_WAIT_S / 4)
        hand.jobs[0].extend()
    assert hand.jobs[0].owned
    assert not other.jobs
    hand.jobs[0].ack()


async def test_an_acknowledged_job_is_gone(world: World, eventually: Eventually) -> None:
    """After the acknowledgement the queue is empty."""
    gateway, hand = await world.gateway(), await world.worker()
    world.submit(gateway)
    hand.pull(world.queue)
    await eventually(lambda: hand.jobs)
    hand.jobs[0].ack()

    async def empty() -> bool:
        return world.queue not in {d.queue for d in await gateway.queue_depths()}

    await eventually(empty)


async def test_a_job_given_back_comes_again(world: World, eventually: Eventually) -> None:
    """A job handed back is delivered again, counted."""
    gateway, hand = await world.gateway(), await world.worker()
    world.submit(gateway)
    hand.pull(world.queue)
    await eventually(lambda: hand.jobs)
    hand.jobs[0].nak()
    hand.pull(world.queue)
    await eventually(lambda: len(hand.jobs) == 2)
    assert hand.jobs[1].delivery == 2


async def test_a_removed_job_is_never_delivered(world: World, eventually: Eventually) -> None:
    """A job whose caller went away while it was queued is deleted by its sequence."""
    gateway, hand = await world.gateway(), await world.worker()
    _, ear = world.submit(gateway)
    await eventually(lambda: ear.seq is not None)
    assert ear.seq is not None
    gateway.delete_job(ear.seq)

    async def empty() -> bool:
        return world.queue not in {d.queue for d in await gateway.queue_depths()}

    await eventually(empty)
    hand.pull(world.queue, wait_s=0)
    await eventually(lambda: hand.unused)
    assert not hand.jobs


async def test_a_full_queue_refuses(world: World, eventually: Eventually) -> None:
    """Beyond its bound a queue refuses, and what it holds stays."""
    gateway = await world.gateway()
    ears = [world.submit(gateway)[1] for _ in range(MAX_PER_QUEUE + 1)]
    await eventually(lambda: all(ear.seq is not None or ear.error is not None for ear in ears))
    assert isinstance(ears[-1].error, QueueFull)
    assert [ear.error for ear in ears[:-1]] == [None] * MAX_PER_QUEUE
    assert {d.queue: d.waiting for d in await gateway.queue_depths()}[world.queue] == MAX_PER_QUEUE


async def test_too_large_a_job_is_refused(world: World) -> None:
    """What the broker would not take is refused before it is sent."""
    gateway = await world.gateway()
    with pytest.raises(RequestTooLarge):
        world.submit(gateway, b"x" * (gateway.max_message_bytes + 1))


async def test_a_large_job_arrives_whole(world: World, eventually: Eventually) -> None:
    """A job near the limit arrives byte for byte."""
    gateway, hand = await world.gateway(), await world.worker()
    body = secrets.token_bytes(gateway.max_message_bytes - 1000)
    world.submit(gateway, body)
    hand.pull(world.queue)
    await eventually(lambda: hand.jobs)
    assert Envelope.decode(hand.jobs[0].message)[1] == body


async def test_events_arrive_in_order(world: World, eventually: Eventually) -> None:
    """What a worker says reaches the sink, in order."""
    gateway, hand = await world.gateway(), await world.worker()
    envelope, ear = world.submit(gateway)
    frames = [encode_frame(FrameKind.CHUNK, 1, 1, seq, "token", b"x" * seq) for seq in range(200)]
    for frame in frames:
        hand.bus.send_event(envelope.reply, frame)
    await eventually(lambda: len(ear.frames) == len(frames))
    assert ear.frames == frames


async def test_a_question_is_answered(world: World, eventually: Eventually) -> None:
    """A worker's question gets the sink's answer."""
    gateway, hand = await world.gateway(), await world.worker()
    envelope, _ = world.submit(gateway)
    answers: list[bytes | None] = []
    hand.bus.request(envelope.reply, encode_frame(FrameKind.STARTED, 1, 1, 0, "token"), answers.append)
    await eventually(lambda: answers)
    assert answers == [PROCEED]


async def test_a_released_job_is_gone(world: World, eventually: Eventually) -> None:
    """After `release` the gateway answers for itself that nobody waits."""
    gateway, hand = await world.gateway(), await world.worker()
    envelope, ear = world.submit(gateway)
    await eventually(lambda: ear.seq is not None)
    gateway.release(envelope.reply)
    answers: list[bytes | None] = []
    hand.bus.request(envelope.reply, encode_frame(FrameKind.STARTED, 1, 1, 0, "token"), answers.append)
    await eventually(lambda: answers)
    assert answers == [STOP]


async def test_a_dead_gateway_is_noticed(world: World, eventually: Eventually) -> None:
    """A question to a gateway that is no more is answered by the bus: nobody is there."""
    gateway, hand = await world.gateway(), await world.worker()
    reply = gateway.new_reply_subject()
    await gateway.close()
    answers: list[bytes | None] = []

    def asked() -> bool:
        """Again and again: through a proxy, the bus hears a moment later that it is gone."""
        hand.bus.request(reply, encode_frame(FrameKind.STARTED, 1, 1, 0, "token"), answers.append)
        return bool(answers)

    await eventually(asked)
    assert set(answers) == {None}


async def test_a_wakeup_names_the_queue(world: World, eventually: Eventually) -> None:
    """Workers that listen for it hear where a job was stored, and only about queues they serve."""
    gateway, hand = await world.gateway(), await world.worker(bell=True)
    other = world.queue._replace(model="another")
    await gateway.open_queue(other)
    gateway.submit(world.envelope(gateway, model="another"), b"{}", Ear())
    world.submit(gateway)
    await eventually(lambda: hand.rang)
    assert hand.rang == [world.queue]


async def test_two_workers_share_lingering_pulls(world: World, eventually: Eventually) -> None:
    """Jobs go to open pulls in turn."""
    gateway, one, two = await world.gateway(), await world.worker(), await world.worker()
    one.pull(world.queue, batch=2, wait_s=10)
    two.pull(world.queue, batch=2, wait_s=10)
    if world.nats_url:
        await one.bus.ping()
        await two.bus.ping()
    for _ in range(4):
        world.submit(gateway)
    await eventually(lambda: len(one.jobs) + len(two.jobs) == 4)
    assert (len(one.jobs), len(two.jobs)) == (2, 2)


async def test_stopped_pulls_take_nothing(world: World, eventually: Eventually) -> None:
    """A job stored after `stop_pulling` waits for somebody else; none is lost in an inbox."""
    gateway, leaving, staying = await world.gateway(), await world.worker(), await world.worker()
    leaving.pull(world.queue, batch=3, wait_s=10)
    await leaving.bus.stop_pulling()
    world.submit(gateway)
    staying.pull(world.queue, wait_s=10)
    await eventually(lambda: staying.jobs)
    assert not leaving.jobs
    assert staying.jobs[0].delivery == 1


async def test_control_reaches_its_worker(world: World, eventually: Eventually) -> None:
    """A control message reaches the worker it names, and no other."""
    gateway, one, two = await world.gateway(), await world.worker(), await world.worker()
    heard: dict[str, list[bytes]] = {"one": [], "two": []}
    await one.bus.subscribe_control("worker-one", heard["one"].append)
    await two.bus.subscribe_control("worker-two", heard["two"].append)
    if world.nats_url:
        await one.bus.ping()
    gateway.send_control("worker-one", b"drain")
    await eventually(lambda: heard["one"])
    assert heard == {"one": [b"drain"], "two": []}


async def test_depths_tell_waiting_from_running(world: World, eventually: Eventually) -> None:
    """Depths count what waits and what is with a worker."""
    gateway, hand = await world.gateway(), await world.worker()
    ears = [world.submit(gateway)[1] for _ in range(3)]
    await eventually(lambda: all(ear.seq is not None for ear in ears))
    hand.pull(world.queue)
    await eventually(lambda: hand.jobs)
    depth = {d.queue: d for d in await gateway.queue_depths()}[world.queue]
    assert (depth.waiting, depth.in_progress) == (2, 1)


async def test_storage_tells_how_full_the_streams_are(world: World, eventually: Eventually) -> None:
    """Jobs take room in their stream; a stream that does not exist is left out."""
    gateway = await world.gateway()
    before = {room.stream: room for room in (await gateway.storage_usage()).streams}["NEXUS_JOBS"]
    ears = [world.submit(gateway)[1] for _ in range(3)]
    await eventually(lambda: all(ear.seq is not None for ear in ears))
    storage = await gateway.storage_usage()
    after = {room.stream: room for room in storage.streams}["NEXUS_JOBS"]
    assert after.messages == before.messages + 3
    assert after.bytes > before.bytes
    assert storage.unrecorded == 0


async def test_who_waits_for_a_lost_job_is_told(
    bus_nats: Any, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """A job went unheard, as between two servers of which one froze: who waits for it learns that, and who waits for others does not."""
    monkeypatch.setattr(gateway_bus, "LOST_JOB_CHECK_INTERVAL_S", 0.1)
    monkeypatch.setattr(gateway_bus, "SETTLE_DELAY_S", 0.1)
    world = World(bus_nats.url)
    gateway, hand = await world.gateway(), await world.worker()
    ears = [world.submit(gateway)[1] for _ in range(4)]
    await eventually(lambda: all(ear.seq is not None for ear in ears))
    ears[1].is_waiting = False  # it runs, as far as its gateway knows
    hand.pull(world.queue, batch=3)
    await eventually(lambda: len(hand.jobs) == 3)
    hand.jobs[0].extend()
    for job in hand.jobs[1:]:
        job.ack()
    await eventually(lambda: ears[2].error is not None)
    assert isinstance(ears[2].error, BackendFailed)
    assert ears[2].error.info.code == "events_lost"
    assert [ear.error for ear in (ears[0], ears[1], ears[3])] == [None] * 3
    for bus in reversed(world.closing):
        await bus.close()
