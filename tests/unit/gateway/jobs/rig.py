"""Gateways and workers of durable jobs in one process, without any server, and with a clock of their own."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import orjson

from backbone.bus.job_log import JobLog
from backbone.bus.private_job_log import PrivateJobLog
from backbone.bus.subjects import USAGE_QUEUE
from backbone.store.store import JobLimit
from backbone.team_keys import TeamKeys
from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.bus import MemoryBroker, MemoryGatewayBus, MemoryWorkerBus
from backbone.testing.byte_quotas import MemoryByteQuotas
from backbone.testing.job_log import MemoryJobLog, MemoryWorkerLog
from backbone.testing.registry import MemoryHub, MemoryRegistry
from backbone.testing.store import MemoryStore
from gateway.auth.authenticator import Principal
from gateway.dispatcher import Dispatcher
from gateway.http.inference_body import ReceivedRequest
from gateway.http.request_body import parse_body
from gateway.jobs.api import JobEvent, Submission
from gateway.jobs.attempt_gate import AttemptGate
from gateway.jobs.content_retention import ContentRetention
from gateway.jobs.estimator import EtaEstimator
from gateway.jobs.expiry import ExpiryWatcher
from gateway.jobs.lane_change import LaneChanger
from gateway.jobs.outcome_recorder import OutcomeRecorder
from gateway.jobs.seal_refusals import SealRefusalCounter
from gateway.jobs.service import JobService
from gateway.jobs.storage_quotas import JobStorageQuotas
from gateway.jobs.submitter import JobSubmitter
from gateway.jobs.terminator import JobTerminator
from gateway.jobs.usage import OutcomeUsage
from gateway.limits.effective import EffectiveLimits
from gateway.metrics import GatewayMetrics
from gateway.usage.emitter import UsageEmitter
from gateway.usage.events import decode_events
from schemas.endpoints import CHAT, EndpointSpec
from schemas.frames import Frame, decode_frame
from schemas.jobs import Capability, JobRecord, JobStatus, Limits
from schemas.outcome import Outcome
from schemas.presence import CatalogEntry
from schemas.usage import UsageEvent
from tests.conftest import Eventually
from workers.backends.base import BackendConfig, Output, Task
from workers.backends.echo.adapter import EchoBackend
from workers.metrics import WorkerMetrics
from workers.worker import Worker

OWNER = "alice"
KEEP_S = 7 * 86_400.0
QUEUE_S = 600.0
ECHO = CatalogEntry(name="echo", capabilities=(Capability.CHAT,), created=1)


class Clock:
    """The clock of gateways and their store. It runs, and jumps when a test moves it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def time(self) -> float:
        return time.time() + self.ahead

    def now(self) -> float:
        """As `gateway.clock` has it."""
        return self.time()

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


class GatedEcho(EchoBackend):
    """Begins to answer when the gate is open."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(BackendConfig())
        self._attempts = rig.attempts
        self._rig = rig

    async def run(self, task: Task) -> AsyncIterator[Output]:
        rig = self._rig
        rig.ran.append(task.job)
        rig.running += 1
        rig.most = max(rig.most, rig.running)
        try:
            await rig.gate.wait()
            async with aclosing(super().run(task)) as output:  # type: ignore[type-var]
                async for piece in output:
                    rig.made += 1
                    yield piece
        finally:
            rig.running -= 1
            rig.stopped.append(task.job)


class Gateway:
    """What one gateway does for durable jobs."""

    def __init__(self, rig: Rig) -> None:
        self.metrics = GatewayMetrics()
        log = MemoryJobLog(rig.broker)
        sealed_log = PrivateJobLog(log, SealRefusalCounter(self.metrics).count, TeamKeys(rig.team_keys))
        self.log: JobLog = sealed_log if rig.sealed else log
        content_keys = sealed_log.content_keys
        content = ContentRetention(content_keys, self.log, rig.store, rig.blobs)
        self.registry = MemoryRegistry(rig.hub)
        bus = MemoryGatewayBus(rig.broker)
        self.dispatcher = Dispatcher(bus, self.registry, self.metrics, rig.limits)
        self.terminator = JobTerminator(self.log, rig.store, bus)
        submitter = JobSubmitter(
            self.log,
            rig.store,
            self.terminator,
            self.dispatcher,
            self.metrics,
            keep_s=KEEP_S,
            queue_s=QUEUE_S,
            content_keys=content_keys,
        )
        estimator = EtaEstimator(rig.store, lambda: self.registry.snapshot)
        self.emitter = UsageEmitter(self.log.work_queue(USAGE_QUEUE), None, lambda _: None)
        usage = OutcomeUsage(self.emitter, rig.store)
        self.jobs = JobService(
            self.log,
            rig.store,
            rig.blobs,
            submitter,
            self.terminator,
            estimator,
            LaneChanger(self.log, rig.store, self.terminator, bus),
            keep_s=KEEP_S,
            usage=usage,
            content=content,
        )
        self.recorder = OutcomeRecorder(
            self.log,
            rig.store,
            rig.blobs,
            self.terminator,
            self.metrics,
            keep_s=KEEP_S,
            enqueue=self._enqueue,
            usage=usage,
            storage=JobStorageQuotas(
                MemoryByteQuotas(),
                MemoryByteQuotas(),
                self.log,
                rig.blobs,
                rig.store,
                lambda _: EffectiveLimits(result_bytes=rig.max_result_bytes),
                rig.is_unfinished,
                keep_s=KEEP_S,
            ),
            content=content,
        )
        self.expiry_watcher = ExpiryWatcher(
            self.log,
            rig.store,
            self.terminator,
            ack_wait_s=rig.ack_wait_s,
            content=content,
            is_held=self.dispatcher.is_held,
        )
        self.gate = AttemptGate(
            self.log,
            rig.store,
            ack_wait_s=rig.ack_wait_s,
            keep_s=KEEP_S,
            max_running=lambda key: JobLimit(rig.max_running[key]) if key in rig.max_running else None,
            content_keys=content_keys,
        )
        self.hooks = rig.hooks
        self._tasks: list[asyncio.Task[None]] = []

    async def _enqueue(self, outcome: Outcome) -> None:
        self.hooks.append(outcome)

    async def start(self) -> None:
        await self.dispatcher.bus.start()
        await self.registry.start()
        await self.dispatcher.start()
        await self.log.serve_gate_requests(self.gate)
        await self.emitter.start()
        self._tasks = [asyncio.create_task(work) for work in (self.recorder.run(), self.expiry_watcher.run())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self.emitter.close()
        await self.log.close()
        await self.gate.close()
        await self.dispatcher.close()
        await self.registry.close()
        await self.dispatcher.bus.close()

    def counted(self, metric: str) -> float:
        """The sum over all labels."""
        families = self.metrics.registry.collect()
        return sum(s.value for family in families for s in family.samples if s.name == f"nexus_{metric}_total")


class Rig:
    """Everything, and what tests look at."""

    def __init__(self, eventually: Eventually, *, ack_wait_s: float, limits: Limits, sealed: bool = False) -> None:
        self.eventually = eventually
        self.sealed = sealed
        """Gateways check seals. Off: tests say by hand what attempts would."""
        self.ack_wait_s, self.limits = ack_wait_s, limits
        self.clock = Clock()
        self.broker = MemoryBroker(ack_wait_s=ack_wait_s)
        self.store = MemoryStore(self.clock.monotonic)
        self.blobs = MemoryBlobStore()
        self.hub = MemoryHub()
        self.hub.models[ECHO.name] = ECHO  # known, though nobody may serve it now
        self.max_running: dict[str, int] = {}
        self.max_result_bytes: int | None = None
        self.unfinished_batches: set[str] = set()
        self.team_keys: dict[str, dict[str, bytes]] = {}
        self.hooks: list[Outcome] = []
        self.gateways: list[Gateway] = []
        self.workers: dict[str, tuple[Worker, asyncio.Task[None]]] = {}
        self.gate = asyncio.Event()
        """Backends wait for it before they say anything."""
        self.gate.set()
        self.attempts: OrderedDict[str, int] = OrderedDict()
        """Of each job, over all backends: `fail_times` counts them."""
        self.ran: list[str] = []
        self.stopped: list[str] = []
        self.running = self.most = 0
        self.made = 0
        """Pieces of output."""

    @property
    def jobs(self) -> JobService:
        return self.gateways[0].jobs

    async def gateway(self) -> Gateway:
        """One more."""
        gateway = Gateway(self)
        await gateway.start()
        self.gateways.append(gateway)
        return gateway

    async def is_unfinished(self, _owner: str, batch: str) -> bool:
        return batch in self.unfinished_batches

    async def close_gateways(self) -> None:
        gateways, self.gateways = self.gateways, []
        for gateway in gateways:
            await gateway.close()

    async def worker(self, name: str = "w", *, slots: int = 4, drain_s: float = 0.2) -> Worker:
        """One more, beside an echo backend."""
        worker = Worker(
            worker_id=name, host="h", backend=GatedEcho(self), blobs=self.blobs, log=MemoryWorkerLog(self.broker),
            registry=MemoryRegistry(self.hub), metrics=WorkerMetrics(), ack_wait_s=self.ack_wait_s, slots=slots,
            health_interval_s=0.1, drain_s=drain_s,
        )  # fmt: skip
        life = asyncio.create_task(worker.run(MemoryWorkerBus(self.broker, worker.on_job)))
        self.workers[name] = worker, life
        await self.eventually(lambda: name in self.hub.workers)
        return worker

    async def open_queues(self) -> None:
        """The models are known, as they are once a worker was there."""
        await self.worker("first")
        await self.eventually(lambda: bool(self.gateways[0].dispatcher.catalog.list_live()))
        await self.drain("first")

    async def drain(self, name: str = "w") -> None:
        worker, life = self.workers.pop(name)
        worker.drain()
        await life

    def kill_attempts(self, name: str = "w") -> int:
        """Kill all running attempts as if their process had died, and return their number."""
        tasks = list(self.workers[name][0]._tasks)
        for task in tasks:
            task.cancel()
        return len(tasks)

    async def worker_vanishes(self, name: str = "w") -> None:
        """As when its machine is switched off."""
        worker, life = self.workers.pop(name)
        for task in list(worker._tasks):
            task.cancel()
        worker.drain()
        await life

    async def close(self) -> None:
        self.gate.set()
        self.broker.available = True
        self.store.available = self.blobs.available = True
        for name in list(self.workers):
            await self.drain(name)
        await self.close_gateways()

    # Asking

    def submission(
        self, text: str = "hello you", *, key: str = "", job_id: str = "", caller_waits: bool = False, **fields: Any
    ) -> Submission:
        """A chat. `fields` are the body's, but for those of Submission."""
        own = {name: fields.pop(name) for name in ("metadata", "webhook", "timeout_s", "lane") if name in fields}
        endpoint: EndpointSpec = fields.pop("endpoint", CHAT)
        limits = EffectiveLimits(
            queued=JobLimit(fields.pop("max_queued", None)), retain_none=fields.pop("retain_none", False)
        )
        body = orjson.dumps({"model": "echo", "messages": [{"role": "user", "content": text}], **fields})
        return Submission(
            principal=Principal(OWNER, key_id=key, limits=limits), endpoint=endpoint, request_id="req",
            received=ReceivedRequest(parse_body(body, endpoint.schema), body), job_id=job_id, caller_waits=caller_waits, **own,
        )  # fmt: skip

    async def submit(self, text: str = "hello you", **fields: Any) -> str:
        """The id of a new job."""
        return (await self.jobs.submit(self.submission(text, **fields))).job

    async def status(self, job: str) -> JobStatus:
        return (await self.jobs.get(OWNER, job)).status

    async def ended(self, job: str) -> JobRecord:
        """Its record, once it has ended and that is recorded."""

        async def look() -> JobRecord | None:
            record = await self.store.get(OWNER, job)
            return record if record is not None and record.finished_at is not None else None

        return await self.eventually(look, what=f"the end of {job}")

    async def until(self, job: str, status: JobStatus) -> JobRecord:
        async def look() -> JobRecord | None:
            record = await self.store.get(OWNER, job)
            return record if record is not None and record.status is status else None

        return await self.eventually(look, what=f"{job} {status}")

    async def text(self, job: str) -> str:
        """Return the text of an answer."""
        result = await self.jobs.result(OWNER, job)
        assert result.error is None
        return str(orjson.loads(result.data)["choices"][0]["message"]["content"])

    async def events(self, job: str, after: str = "") -> list[JobEvent]:
        return [event async for event in self.jobs.follow(OWNER, job, after)]

    def frames(self, job: str) -> list[Frame]:
        return [decode_frame(event.data) for event in self.broker.job_log.events.get(job, [])]

    def kinds(self, job: str) -> str:
        """The letters of its stored events."""
        return "".join(frame.kind for frame in self.frames(job))

    def usage(self, job: str) -> list[UsageEvent]:
        """The events about a job that are stored for the ledger, each (job, run) once, by run."""
        items = self.broker.job_log.work_queues[USAGE_QUEUE].items
        found: dict[int, UsageEvent] = {}
        for item in items:
            for event in decode_events(item.data.partition(b"\n")[2] if self.sealed else item.data):
                assert isinstance(event, UsageEvent)
                if event.job == job:
                    found.setdefault(event.run, event)
        return [found[run] for run in sorted(found)]

    @property
    def queued(self) -> int:
        """Job messages that are still stored."""
        return len(self.broker.jobs)
