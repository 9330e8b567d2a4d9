"""Workers' accounts on three NATS servers: whichever server a worker is on, and whichever leads its queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from backbone.bus.bus import JobDelivery, Queue
from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.gateway_bus import NatsGatewayBus
from backbone.bus.nats.jetstream import JobsStreamConfig
from backbone.bus.nats.worker_bus import NatsWorkerBus
from backbone.ids import new_job_id
from backbone.secret_files import Password
from schemas.errors import NexusError, Unavailable
from schemas.frames import PROCEED, FrameKind, encode_frame
from schemas.jobs import Capability, Envelope, Lane
from tests.conftest import Eventually
from tests.deploy.production import Secrets, worker_block
from tests.deploy.test_secrets import Node
from tests.jetstream import request
from tests.ports import free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACK_WAIT_S = 60.0
"""Longer than a test: what comes only after it is lost here."""
PULL_S = 4.0
QUEUE = Queue(Capability.CHAT, Lane.DEFAULT, "m")


@dataclass
class Ear:
    """The one who waits for a job's answer."""

    frames: list[bytes] = field(default_factory=list)
    seq: int | None = None
    is_waiting: bool = True
    started_at: float | None = None
    error: NexusError | None = None

    def on_stored(self, seq: int) -> None:
        self.seq = seq

    def on_refused(self, error: NexusError) -> None:
        self.error = error

    def on_event(self, data: bytes) -> bytes | None:
        self.frames.append(data)
        return PROCEED


@dataclass
class Three:
    """Three servers, a gateway on all of them, and workers on one each."""

    nodes: list[Node]
    secrets: Secrets
    gateway: NatsGatewayBus

    def access(self, user: str, folder: str, *nodes: Node) -> NatsAccess:
        return NatsAccess(
            ",".join(node.url for node in nodes or self.nodes),
            user=user,
            password=Password("NATS_PASSWORD", None, self.secrets.file(f"{folder}/nats-password")),
            tls=self.secrets.client_context,
            inbox_prefix=f"_INBOX.{user}",
        )

    async def worker(self, node: Node, jobs: list[JobDelivery]) -> NatsWorkerBus:
        access = self.access("gpu1", "worker-gpu1", node)
        bus = NatsWorkerBus(access, worker="gpu1", ack_wait_s=ACK_WAIT_S, on_job=jobs.append)
        await bus.start()
        await bus.serve([QUEUE], None)
        return bus

    def submit(self) -> tuple[Envelope, Ear]:
        envelope = Envelope(
            job=new_job_id(), request_id="req_1", endpoint="/v1/chat/completions", capability=QUEUE.capability, model="m",
            public_model="m", reply=self.gateway.new_reply_subject(),
        )  # fmt: skip
        ear = Ear()
        self.gateway.submit(envelope, b"{}", ear)
        return envelope, ear


async def _until_it_works(start: object) -> None:
    for _ in range(100):
        try:
            await start()  # type: ignore[operator]
        except Unavailable:
            await asyncio.sleep(0.2)
        else:
            return
    raise AssertionError("the cluster does not come up")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Three]:
    folder: Path = tmp_path_factory.mktemp("three")
    secrets = Secrets(folder / "secrets")
    secrets.make()
    worker_block(secrets.folder, "gpu1", "--model", "m")
    secrets.make("--worker", "gpu1")
    routes = [free_port() for _ in range(3)]
    nodes = [Node(folder / f"nats-{n}", secrets, routes, n) for n in range(3)]
    await asyncio.gather(*(node.start() for node in nodes))
    three = Three(nodes, secrets, None)  # type: ignore[arg-type]
    stream = JobsStreamConfig(replicas=3, max_bytes=64 * 1024 * 1024)
    access = three.access("gateway", "gateway")

    async def start() -> None:
        three.gateway = NatsGatewayBus(access, gateway="gw", ack_wait_s=ACK_WAIT_S, stream=stream)
        try:
            await three.gateway.start()
            await three.gateway.open_queue(QUEUE)
        except Unavailable:
            await three.gateway.close()
            raise

    await _until_it_works(start)
    yield three
    await three.gateway.close()
    await asyncio.gather(*(node.stop() for node in nodes))


@pytest.mark.parametrize("number", range(3))
async def test_a_worker_serves_from_any_server(three: Three, number: int, eventually: Eventually) -> None:
    """It pulls, asks its gateway, answers and acknowledges, wherever the queue's leader is."""
    jobs: list[JobDelivery] = []
    answers: list[bytes | None] = []
    worker = await three.worker(three.nodes[number], jobs)
    worker.pull(QUEUE, 2, PULL_S, lambda *_: None)
    envelope, ear = three.submit()
    await eventually(lambda: jobs)
    worker.request(envelope.reply, encode_frame(FrameKind.STARTED, 1, 1, 0, "token", b"{}"), answers.append)
    await eventually(lambda: answers == [PROCEED])
    nobody: list[bytes | None] = []
    worker.request("nexus.reply.nobody.x", b"h 1 1\n", nobody.append)
    await eventually(lambda: nobody == [None])
    worker.send_event(envelope.reply, encode_frame(FrameKind.DONE, 1, 1, 1, "token", b"{}\n"))
    jobs[0].ack()
    await eventually(lambda: len(ear.frames) == 2)

    async def is_empty() -> bool:
        return (await request(three.gateway._connection, "STREAM.INFO.NEXUS_JOBS"))["state"]["messages"] == 0

    await eventually(is_empty)
    await worker.stop_pulling()
    await worker.close()


@pytest.mark.parametrize("number", range(3))
async def test_a_pull_of_a_worker_that_left_takes_no_job(three: Three, number: int, eventually: Eventually) -> None:
    """What comes to it goes back at once, to the worker that stays: not after `ack_wait`."""
    stays: list[JobDelivery] = []
    leaves: list[JobDelivery] = []
    leaving = await three.worker(three.nodes[number], leaves)
    leaving.pull(QUEUE, 2, PULL_S, lambda *_: None)
    await leaving.ping()
    await leaving.stop_pulling()
    closing = asyncio.create_task(leaving.close())
    staying = await three.worker(three.nodes[(number + 1) % 3], stays)
    staying.pull(QUEUE, 4, PULL_S, lambda *_: None)
    for _ in range(3):
        three.submit()
    await eventually(lambda: len(stays) == 3)
    assert leaves == []
    for job in stays:
        job.ack()
    await closing
    await staying.stop_pulling()
    await staying.close()
