"""Any number of gateways' and workers' sides of one broker, in memory or on NATS, for tests of durable jobs' records."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from backbone.bus.bus import Queue
from backbone.bus.job_log import JobLog, Retention, WorkerLog
from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.gateway_bus import NatsGatewayBus
from backbone.bus.nats.jetstream import JobsStreamConfig
from backbone.bus.nats.job_log import NatsJobLog
from backbone.bus.nats.worker_bus import NatsWorkerBus
from backbone.bus.nats.worker_log import NatsWorkerLog
from backbone.testing.bus import MemoryBroker, MemoryGatewayBus, MemoryWorkerBus
from backbone.testing.job_log import MemoryJobLog, MemoryWorkerLog
from schemas.jobs import Capability, Envelope, JobStatus, Lane
from schemas.outcome import Outcome

ACK_WAIT_S = 30.0
MAX_PER_QUEUE = 20
MIB = 1024 * 1024
SMALL = Retention(max_event_bytes=256 * MIB, max_outcome_bytes=64 * MIB, max_dead_letter_bytes=64 * MIB)


class World:
    """One broker, any number of sides."""

    def __init__(self, nats_url: str | NatsAccess | None, kept: Retention = SMALL) -> None:
        self.nats_url = nats_url
        self.kept = kept
        self.broker = MemoryBroker(ack_wait_s=ACK_WAIT_S, max_per_queue=MAX_PER_QUEUE)
        self.closing: list[Any] = []
        self.queue = Queue(Capability.CHAT, Lane.DEFAULT, f"model.{secrets.token_hex(4)} *>")

    async def _open(self, side: Any) -> Any:
        await side.start()
        self.closing.append(side)
        return side

    async def gateway(self) -> JobLog:
        name = secrets.token_hex(4)
        side = NatsJobLog(self.nats_url, name, retention=self.kept) if self.nats_url else MemoryJobLog(self.broker)
        log: JobLog = await self._open(side)
        return log

    async def worker(self) -> WorkerLog:
        side = NatsWorkerLog(self.nats_url, secrets.token_hex(4)) if self.nats_url else MemoryWorkerLog(self.broker)
        log: WorkerLog = await self._open(side)
        return log

    async def open_queue(self) -> None:
        """Make the jobs stream, and the queue of `self.queue`."""
        stream = JobsStreamConfig(max_per_queue=MAX_PER_QUEUE, max_bytes=64 * MIB)
        side = (
            NatsGatewayBus(self.nats_url, gateway=secrets.token_hex(4), ack_wait_s=ACK_WAIT_S, stream=stream)
            if self.nats_url
            else MemoryGatewayBus(self.broker)
        )
        await (await self._open(side)).open_queue(self.queue)

    async def hand(self, jobs: list[Any]) -> Any:
        """A worker that pulls from `self.queue` into `jobs`."""
        side = (
            NatsWorkerBus(self.nats_url, worker=secrets.token_hex(4), ack_wait_s=ACK_WAIT_S, on_job=jobs.append)
            if self.nats_url
            else MemoryWorkerBus(self.broker, jobs.append)
        )
        bus = await self._open(side)
        await bus.serve([self.queue], None)
        return bus

    async def close(self) -> None:
        for side in reversed(self.closing):
            await side.close()


def new_job() -> str:
    return f"job_{secrets.token_hex(16)}"


def envelope(world: World, **fields: Any) -> Envelope:
    values = {
        "job": new_job(),
        "request_id": "req_1",
        "endpoint": "/v1/chat/completions",
        "capability": world.queue.capability,
        "lane": world.queue.lane,
        "model": world.queue.model,
        "public_model": world.queue.model,
        "reply": "nexus.events.x",
        "durable": True,
    }
    return Envelope(**(values | fields))


def outcome_of(job: str, status: JobStatus = JobStatus.COMPLETED, **fields: Any) -> Outcome:
    values = {
        "job": job,
        "status": status,
        "owner": "o",
        "endpoint": "/v1/chat/completions",
        "capability": Capability.CHAT,
        "model": "a model/with.dots",
        "public_model": "m",
    }
    return Outcome(**(values | fields))


async def next_of(items: Any, timeout_s: float = 20.0) -> Any:
    async with asyncio.timeout(timeout_s):
        return await anext(items)


async def read(events: Any, count: int, timeout_s: float = 20.0) -> list[bytes]:
    """The next `count` events, without the pauses between them."""
    found: list[bytes] = []
    async with asyncio.timeout(timeout_s):
        while len(found) < count:
            event = await anext(events)
            if event is not None:
                found.append(event.data)
    return found


def frames(count: int, *, start: int = 0) -> list[bytes]:
    return [b"event %d" % n for n in range(start, start + count)]


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
