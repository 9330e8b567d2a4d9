"""Free slots become jobs in hand on a real nats-server, whose pulls, ends and notifications come when they come."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from typing import Any

import pytest

from backbone.bus.bus import JobDelivery, Queue
from backbone.bus.nats.gateway_bus import NatsGatewayBus
from backbone.bus.nats.jetstream import JobsStreamConfig
from backbone.bus.nats.worker_bus import NatsWorkerBus
from schemas.jobs import LANES, Capability, Envelope
from tests.conftest import Eventually
from tests.servers import source
from workers.puller import Puller

LISTED = 300
USED = [Queue(Capability.CHAT, lane, f"m{number}") for number in range(4) for lane in LANES]


class Ear:
    is_waiting = True
    started_at: float | None = None

    def on_stored(self, seq: int) -> None: ...

    def on_refused(self, error: Exception) -> None:
        raise error

    def on_event(self, _data: bytes) -> bytes | None: ...


class Desk:
    """A worker that works by the clock, and notes how long each job waited beside an idle slot."""

    def __init__(self, url: str, slots: int) -> None:
        self.bus = NatsWorkerBus(url, worker=secrets.token_hex(4), ack_wait_s=5.0, on_job=self.on_job)
        self.puller = Puller(self.bus, slots, frozenset)
        self.slots, self.busy, self.most, self.refused = slots, 0, 0, 0
        self.idle_since = time.monotonic()
        self.is_waiting: list[float] = []
        self.done: set[str] = set()

    def on_job(self, job: JobDelivery) -> None:
        if not self.puller.accept(job):
            self.refused += 1
            job.nak()
            return
        envelope, body = Envelope.decode(job.message)
        sent, work_s = map(float, body.split())
        self.is_waiting.append(time.monotonic() - max(sent, self.idle_since))
        self.busy += 1
        self.most = max(self.most, self.busy)
        asyncio.get_running_loop().call_later(work_s, self.finish, job, envelope.job)

    def finish(self, job: JobDelivery, name: str) -> None:
        job.ack()
        if self.busy == self.slots:
            self.idle_since = time.monotonic()
        self.busy -= 1
        self.done.add(name)
        self.puller.release()


@pytest.fixture(scope="module")
def puller_nats(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.conftest import running

    yield from running(source().nats(tmp_path_factory.mktemp("puller-nats")))


@pytest.mark.parametrize(("slots", "seed"), [(1, 1), (3, 2), (24, 3), (64, 4)])
async def test_every_job_begins_when_there_is_a_slot(
    puller_nats: Any, eventually: Eventually, slots: int, seed: int
) -> None:
    """Streams and bursts over lanes and models, of which most are only listed: no slot is exceeded, none is idle for long."""
    chance = random.Random(seed)
    stream = JobsStreamConfig(max_bytes=64 * 1024 * 1024)
    gateway = NatsGatewayBus(puller_nats.url, gateway=secrets.token_hex(4), ack_wait_s=5.0, stream=stream)
    await gateway.start()
    desk = Desk(puller_nats.url, slots)
    await desk.bus.start()
    listed = [Queue(Capability.CHAT, lane, f"idle-{number}") for number in range(LISTED) for lane in LANES]
    await desk.puller.serve([*USED, *listed])
    desk.puller.open()
    sent = 0

    def submit(queue: Queue, work_s: float) -> None:
        nonlocal sent
        sent += 1
        envelope = Envelope(
            job=f"job_{secrets.token_hex(16)}", request_id="r", endpoint="/", capability=queue.capability,
            lane=queue.lane, model=queue.model, public_model=queue.model, reply=gateway.new_reply_subject(),
        )  # fmt: skip
        gateway.submit(envelope, b"%f %f" % (time.monotonic(), work_s), Ear())

    fast = USED[1]
    for _ in range(40):
        for _ in range(chance.choice([1, 5, 10])):
            submit(fast, 0.001)
        if chance.random() < 0.3:
            for _ in range(chance.choice([1, slots])):
                submit(chance.choice(USED), 0.1)
        await asyncio.sleep(0.03)
    await eventually(lambda: len(desk.done) == sent)
    assert desk.most <= slots
    assert desk.refused == 0
    # A wake-up and one poll, as promised for a redelivered job; the machine may be busy meanwhile.
    assert max(desk.is_waiting) < 1.0 + 0.8
    await desk.puller.close()
    await desk.bus.close()
    await gateway.close()
