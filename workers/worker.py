"""A worker: takes jobs from the bus, runs them on one backend, and announces itself to the registry."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from time import monotonic

import structlog

from backbone.bus.blobs import BlobStore
from backbone.bus.bus import JobDelivery, Queue, WorkerBus
from backbone.bus.job_log import WorkerLog
from backbone.bus.subjects import encode_model
from backbone.logging import answer_log_query
from backbone.registry.registry import Registry
from backbone.tracing.spans import Tracer
from schemas.control import Control, ControlOp
from schemas.errors import NexusError
from schemas.jobs import LANES, Capability, Envelope
from schemas.logs import LogRequest, ProcessKind
from schemas.presence import (
    ModelOffer,
    RegistrySnapshot,
    ServiceRecord,
    WorkerState,
)
from workers.attempt import Attempt, StopReason
from workers.backends.base import Backend, BackendError, BackendUnavailable, is_unreachable
from workers.event_outbox import EventOutbox
from workers.load_monitor import LoadMonitor
from workers.metrics import WorkerMetrics
from workers.model_descriptors import ModelDescriptors
from workers.model_pauses import ModelPauses
from workers.model_turns import ModelTurns
from workers.outbox import Outbox
from workers.presence_reporter import PresenceReporter, truncate_problems
from workers.puller import Puller
from workers.reply_outbox import ReplyOutbox
from workers.requirement_checks import missing_requirements, optional_problems
from workers.worker_context import WorkerContext

log = structlog.get_logger(__name__)

LIMIT_CHECK_INTERVAL_S = 0.25
NO_SLOT_RETRY_S = 0.1
PROBLEM_LOG_INTERVAL_S = 30.0
"""The shortest interval of log lines about changing problems of the backend."""
CONNECTION_LOSS_INTERVAL_S = 10.0
"""The shortest interval at which a broken connection may stop the pulling until the backend answers. A refused one always does."""
HEALTH_TIMEOUT_S = 10.0
"""How long a backend's health check or discovery may take."""
MAX_HEALTH_TIMEOUTS = 3
HEALTH_CHECKS_PER_DISCOVERY = 3
"""A new model is served within this many health check intervals."""


class Worker:
    """Runs the jobs of one worker process, and keeps its presence in the registry. `run` returns when the worker has drained."""

    def __init__(
        self,
        *,
        worker_id: str,
        host: str,
        backend: Backend,
        blobs: BlobStore,
        log: WorkerLog,
        registry: Registry,
        metrics: WorkerMetrics,
        ack_wait_s: float,
        slots: int = 0,
        health_interval_s: float = 5.0,
        swap_patience_s: float = 10.0,
        drain_s: float = 25.0,
        adapts: bool = True,
        tracer: Tracer | None = None,
    ) -> None:
        """Create a worker. `adapts`: parameters that the server lacks are replaced by their nearest equivalent, not refused. `tracer`: None where tracing is off."""
        self.id = worker_id
        self._backend = backend
        self._blobs = blobs
        self._log = log
        self._registry = registry
        self._metrics = metrics
        self._heartbeat_s = ack_wait_s / 3
        self._configured_slots = slots
        self._health_interval_s = health_interval_s
        self._drain_s = drain_s
        self._changed = asyncio.Event()
        self._attempts: dict[tuple[str, int, int], Attempt] = {}
        # Without the models in memory, the worker cannot observe that the server swaps them.
        reports_models = type(backend).resident_models is not Backend.resident_models
        self._turns = ModelTurns(swap_patience_s) if reports_models else None
        self._load_monitor = self._make_load_monitor(self._turns) if self._turns is not None else None
        self._bus: WorkerBus | None = None
        self._puller: Puller | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._models: tuple[ModelOffer, ...] = ()
        self._descriptors = ModelDescriptors(backend)
        self._last_model: str | None = None
        self._unservable: set[str] = set()
        self._services: Mapping[str, ServiceRecord] = {}
        self._problems: tuple[str, ...] = ()
        self._next_problem_log = 0.0
        self._pauses = ModelPauses()
        self._presence = PresenceReporter(registry, backend, self._pauses, worker=worker_id, host=host)
        self._next_connection_loss = 0.0
        self._slots = 1
        self._state = WorkerState.UNHEALTHY
        self._context = WorkerContext(worker_id, backend.name, adapts=adapts, tracer=tracer)
        self._drain_requested = asyncio.Event()
        backend.notify_changed = self._changed.set
        metrics.busy.set_function(lambda: len(self._attempts))

    def _make_load_monitor(self, turns: ModelTurns) -> LoadMonitor:
        return LoadMonitor(
            self._backend,
            turns,
            worker=self.id,
            attempts=self._attempts.values,
            on_models_changed=self._changed.set,
            on_poll=self._refill,
        )

    def _refill(self) -> None:
        if self._puller is not None:
            self._puller.refill()

    # Lifecycle

    async def run(self, bus: WorkerBus) -> None:
        """Serve until drained. `bus` delivers jobs to `self.on_job`."""
        self._bus = bus
        await self._backend.start()
        await bus.start()
        await self._start_registry()
        await bus.subscribe_control(self.id, self._on_control)
        watcher = asyncio.create_task(self._watch_attempts())
        tasks = [asyncio.create_task(self._check_health())]
        if self._load_monitor is not None:
            tasks.append(asyncio.create_task(self._load_monitor.run()))
        try:
            await self._drain_requested.wait()
        finally:
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await self._shut_down()
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
            await bus.close()
            await self._registry.close()
            await self._backend.close()

    async def _start_registry(self) -> None:
        """Start the registry, and follow its services where the backend needs them."""
        follows = self._backend.follows_services
        await self._registry.start(watch=follows)
        if follows:
            self._registry.subscribe(self._on_services)
            self._on_services(self._registry.snapshot or RegistrySnapshot())

    def _on_services(self, snapshot: RegistrySnapshot) -> None:
        if snapshot.services != self._services:
            self._services = snapshot.services
            self._backend.services_changed(snapshot.services)
            self._changed.set()

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the worker is unhealthy, or what a ready worker does not serve."""
        return self._problems

    @property
    def state(self) -> str:
        """`ready` (takes jobs), `starting`, `disconnected` (from NATS), `unhealthy` (its backend does not answer), or `draining`."""
        if self._drain_requested.is_set():
            return WorkerState.DRAINING.value
        if self._bus is None or not self._presence.is_announced:
            return "starting"
        return self._state.value if self._bus.connected else "disconnected"

    def drain(self) -> None:
        """Shut down: leave the registry, take no new jobs, and finish the running ones. A second call stops those as well."""
        if self._drain_requested.is_set():
            for attempt in list(self._attempts.values()):
                attempt.stop(StopReason.DRAINED)
        self._drain_requested.set()

    async def _shut_down(self) -> None:
        self._state = WorkerState.DRAINING
        log.info("worker.draining", worker=self.id, running=len(self._attempts))
        if self._puller is not None:
            self._puller.pause()
        await self._presence.withdraw()
        if self._puller is not None:
            await self._puller.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._drain_s)
        for attempt in list(self._attempts.values()):
            attempt.stop(StopReason.DRAINED)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=3.0)
        log.info("worker.drained", worker=self.id, left=len(self._attempts))

    # Health and presence

    async def _check_health(self) -> None:
        """Check the backend periodically: discover its models at every few checks, and only its health in between."""
        silent, next_discovery = 0, 0.0
        while True:
            try:
                async with asyncio.timeout(HEALTH_TIMEOUT_S):
                    changed = self._changed.is_set()
                    if self._state is not WorkerState.READY or changed or monotonic() >= next_discovery:
                        self._changed.clear()
                        missing = await asyncio.to_thread(missing_requirements, self._backend)
                        loads_before = self._turns.load_count if self._turns is not None else 0
                        discovery = await self._backend.discover()
                        self._update_model_turns(discovery.models, loads_before)
                        next_discovery = monotonic() + HEALTH_CHECKS_PER_DISCOVERY * self._health_interval_s
                        models, undescribed = self._descriptors.describe(discovery.models)
                        optional = optional_problems(missing, models)
                        self._update_problems(discovery.problems + optional + undescribed)
                        await self._serve(models, discovery.slots)
                    else:
                        await self._backend.health()
                        self._resume_pulling()
                silent = 0
            except TimeoutError as error:
                # A server at full load may be slow to answer.
                silent += 1
                if silent >= MAX_HEALTH_TIMEOUTS or self._state is not WorkerState.READY:
                    await self._mark_unhealthy(error)
            except Exception as error:
                await self._mark_unhealthy(error)
            # Check sooner while the backend is away, so that the worker serves soon after it is back.
            well = self._state is WorkerState.READY and self._puller is not None and self._puller.is_open
            pause = self._health_interval_s if well else min(1.0, self._health_interval_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()

    async def _serve(self, models: tuple[ModelOffer, ...], slots: int | None) -> None:
        """Serve these models of a healthy backend."""
        assert self._bus is not None
        slots = self._configured_slots or slots or self._backend.default_slots
        models = tuple(model for model in models if self._is_name_valid(model))
        if self._backend.manages_models:
            models += (ModelOffer(name=f"worker:{self.id}", capabilities=(Capability.MODELS,)),)
        changed = self._puller is None or models != self._models or slots != self._slots
        self._metrics.backend_up.labels(self._backend.name).set(1)
        self._metrics.slots.set(slots)
        if self._puller is None:
            self._puller = Puller(self._bus, slots, self._loaded)
        self._puller.set_model_turns(self._turns if self._turns is not None and self._turns.is_needed else None)
        if changed:
            self._models, self._slots = models, slots
            queues = [Queue(c, lane, m.name) for m in models for c in m.capabilities for lane in LANES]
            await self._puller.serve(queues, slots)
            log.info("worker.serving", worker=self.id, models=[m.name for m in models], slots=slots)
        if self._state is not WorkerState.READY or changed or self._problems != self._presence.announced_problems:
            self._state = WorkerState.READY
            await self._announce()
        self._resume_pulling()

    def _resume_pulling(self) -> None:
        """Take jobs, or take them again after a lost connection: the backend is healthy."""
        if self._puller is not None:
            self._puller.open()

    def _update_problems(self, problems: tuple[str, ...]) -> None:
        """Log each problem once, and the end of all problems."""
        problems = truncate_problems(problems)
        for problem in problems:
            if problem not in self._problems:
                log.warning("worker.problem_found", worker=self.id, problem=problem)
        if self._problems and not problems and self._state is WorkerState.READY:
            log.info("worker.problems_solved", worker=self.id)
        self._problems = problems

    def _is_name_valid(self, model: ModelOffer) -> bool:
        """Return whether a subject can hold the model's name; the other models are served all the same."""
        try:
            encode_model(model.name)
        except NexusError as error:
            if model.name not in self._unservable:
                self._unservable.add(model.name)
                log.warning("worker.model_name_rejected", model=model.name, error=error.info.message)
            return False
        return True

    async def _mark_unhealthy(self, error: Exception) -> None:
        self._metrics.backend_up.labels(self._backend.name).set(0)
        if isinstance(error, TimeoutError):
            message = f"the backend did not answer its health check within {HEALTH_TIMEOUT_S:g} s"
        else:
            message = error.info.message if isinstance(error, NexusError) else f"{type(error).__name__}: {error}"
        problems, now = truncate_problems((message,)), monotonic()
        newly = self._state is WorkerState.READY or not self._presence.is_announced
        another = problems != self._problems and now >= self._next_problem_log
        if newly or another:
            log.warning("worker.backend_unavailable", worker=self.id, backend=self._backend.name, error=message)
            self._next_problem_log = now + PROBLEM_LOG_INTERVAL_S
        if self._puller is not None:
            self._puller.pause()
        self._problems = problems
        if newly or another:
            self._state = WorkerState.UNHEALTHY
            await self._announce()

    async def _announce(self) -> None:
        await self._presence.announce(
            self._state,
            slots=self._slots,
            busy=len(self._attempts),
            models=self._models,
            problems=self._problems,
            descriptors=self._descriptors.encoded,
        )

    def _update_model_turns(self, models: tuple[ModelOffer, ...], loads_before: int) -> None:
        """Set the models that the server may load and unload, and those in memory, unless a load has begun meanwhile."""
        if self._turns is None:
            return
        swappable = frozenset(model.name for model in models if model.loaded is not None or model.loading)
        resident = frozenset(model.name for model in models if model.loaded or model.loading)
        self._turns.update_models(swappable, resident if self._turns.load_count == loads_before else None)

    def _loaded(self) -> frozenset[str]:
        """Return the models that the backend holds in memory; where it does not say, the model of the last job."""
        if self._turns is not None and self._turns.resident_models:
            return self._turns.resident_models
        reported = frozenset(m.name for m in self._models if m.loaded)
        if reported or any(m.loaded is False for m in self._models):
            return reported
        return frozenset((self._last_model,)) if self._last_model else frozenset()

    # Jobs

    def on_job(self, job: JobDelivery) -> None:
        """Start a job that has arrived, or nak it when there is no slot."""
        if self._puller is None or not self._puller.accept(job):
            job.nak(NO_SLOT_RETRY_S)
            return
        if self._load_monitor is not None:
            self._load_monitor.record_start()
        try:
            envelope, body = Envelope.decode(job.message)
        except ValueError as error:
            # The job can never run, and its gateway cannot be notified: the envelope holds the address.
            log.error("worker.malformed_job_dropped", queue=job.queue, error=str(error))
            job.ack()
            self._puller.release(job.queue.model)
            return
        assert self._bus is not None
        if job.delivery > 1:
            self._metrics.redeliveries.labels(envelope.capability, envelope.model).inc()
        attempt = self._attempt(self._bus, job, envelope, body)
        self._attempts[(envelope.job, envelope.run, job.delivery)] = attempt
        self._last_model = envelope.model
        task = asyncio.create_task(self._run(attempt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _attempt(self, bus: WorkerBus, job: JobDelivery, envelope: Envelope, body: bytes) -> Attempt:
        outbox: Outbox
        if envelope.durable:
            outbox = EventOutbox(self._log, self._blobs, self._context, job, envelope)
        else:
            outbox = ReplyOutbox(bus, self._blobs, self._context, job, envelope)
        return Attempt(self._backend, self._blobs, self._context, outbox, body)

    async def _run(self, attempt: Attempt) -> None:
        env, job_model = attempt.envelope, attempt.job.queue.model
        try:
            await attempt.run()
        finally:
            self._attempts.pop((env.job, env.run, attempt.job.delivery), None)
            if attempt.failure is not None:
                self._backend_failed(env.model, attempt.failure)
            elif attempt.outcome == "completed":
                self._pauses.record_success(env.model)
                if self._load_monitor is not None:
                    self._load_monitor.record_completion(env.model)
            if self._puller is not None:
                self._puller.release(job_model)
            # In a later turn of the loop, which sends the last event first: the caller does not wait for the bookkeeping.
            asyncio.get_running_loop().call_soon(self._record_end, attempt, monotonic())

    def _backend_failed(self, model: str, error: BackendError) -> None:
        """Pause the model where its server asks to wait, and all pulling where the server may be gone."""
        if self._puller is None:
            return
        if isinstance(error, BackendUnavailable) and error.pause_s is not None:
            wait_s = self._pauses.record_wait_request(model, error.pause_s, error.info.message)
            log.warning("worker.model_paused", worker=self.id, model=model, seconds=wait_s, error=error.info.message)
            self._puller.pause_model(model, wait_s)
        elif is_unreachable(error) and self._may_pause_for_loss(error):
            wait_s = self._pauses.record_lost_server()
            log.warning("worker.backend_lost", worker=self.id, model=model, error=error.info.message)
            self._puller.pause_model(model, wait_s)
            if self._backend.single_server:
                self._puller.pause()  # until the health check that follows at once
            self._changed.set()

    def _may_pause_for_loss(self, error: BackendError) -> bool:
        """Return whether a lost connection may pause pulling: a request that breaks its connection each time must not do so for long."""
        now = monotonic()
        if not (isinstance(error, BackendUnavailable) and error.unsent) and now < self._next_connection_loss:
            return False
        self._next_connection_loss = now + CONNECTION_LOSS_INTERVAL_S
        return True

    def _record_end(self, attempt: Attempt, ended: float) -> None:
        env, metrics = attempt.envelope, self._metrics
        attempt.log_end(ended)
        metrics.record_attempt(env.capability, env.model, attempt.outcome, ended - attempt.began)
        if attempt.error is not None:
            metrics.backend_errors.labels(self._backend.name, attempt.error.code or "invalid_request").inc()

    async def _watch_attempts(self) -> None:
        """Enforce time limits, send heartbeats, and update the worker's presence."""
        while True:
            await asyncio.sleep(min(LIMIT_CHECK_INTERVAL_S, self._heartbeat_s / 2))
            now = monotonic()
            for attempt in list(self._attempts.values()):
                attempt.enforce_limits(now)
                # Each by its own start: hundreds of heartbeats in one turn would delay the tokens of all streams.
                if now >= attempt.last_heartbeat + self._heartbeat_s:
                    attempt.last_heartbeat = now
                    attempt.send_heartbeat()
            if self._state is WorkerState.READY and self._presence.take_update(now, len(self._attempts)):
                await self._announce()

    def _on_control(self, message: bytes) -> None:
        try:
            control = Control.model_validate_json(message)
        except ValueError:
            log.warning("worker.malformed_control_message")
            return
        if control.op is ControlOp.DRAIN:
            self.drain()
            return
        if control.op is ControlOp.LOGS:
            self._answer_log_request(control.logs)
            return
        for (job, run, _), attempt in list(self._attempts.items()):
            if (job, run) == (control.job, control.run):
                attempt.stop(StopReason.CANCELLED)

    def _answer_log_request(self, request: LogRequest | None) -> None:
        if request is None or self._bus is None:
            return
        answer = answer_log_query(request, ProcessKind.WORKER, self.id)
        with contextlib.suppress(NexusError):  # NATS is away: the gateway reports a worker that does not answer
            self._bus.send_event(request.reply, answer)
