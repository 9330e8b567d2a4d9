"""A worker: takes jobs from the bus, runs them on one backend, and is known to the registry."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from time import monotonic

import structlog

from backbone.bus.blobs import BlobStore
from backbone.bus.bus import JobDelivery, Queue, WorkerBus
from backbone.bus.job_log import WorkerLog
from backbone.bus.subjects import encode_model
from backbone.registry.registry import Announcement, Registry
from backbone.version import VERSION
from schemas.control import Control, ControlOp
from schemas.errors import NexusError
from schemas.jobs import LANES, Capability, Envelope
from schemas.presence import (
    BackendLoad,
    Limitation,
    ModelOffer,
    Pause,
    RegistrySnapshot,
    ServiceRecord,
    WorkerPresence,
    WorkerState,
)
from workers.backends.base import Backend, BackendError, BackendUnavailable, Requirement, is_unreachable
from workers.durable_attempt import DurableAttempt
from workers.metrics import WorkerMetrics
from workers.model_pauses import ModelPauses
from workers.model_turns import ModelTurns
from workers.puller import Puller
from workers.sync_attempt import Attempt, StopReason, WorkerContext

log = structlog.get_logger(__name__)

WATCH_S = 0.25
NO_SLOT_DELAY_S = 0.1
BUSY_UPDATE_S = 5.0
"""How often the registry is told how busy we are; every gateway hears of each change."""
MAX_LIMITATIONS = 100
"""As many limitations, as many pauses, and as many problems are shown in the registry."""
MAX_PROBLEM = 1000
"""Characters of a problem that are shown."""
TROUBLE_LOG_S = 30.0
"""How often another reason for being unhealthy is logged."""
PAUSES_UPDATE_S = 1.0
"""How often the registry is told which models are paused."""
LOSS_S = 10.0
"""How often a connection that breaks may stop intake until the backend has answered. One that is refused always does."""
HEALTH_LIMIT_S = 10.0
"""How long a backend may take to say how it is."""
LOAD_LOOK_S, LOAD_LOOK_MAX_S = 0.02, 0.25
"""How often the server is asked what it holds while it loads a model: often at first, when that shows whether the model fits."""
SILENT_TRIES = 3
DISCOVER_INTERVALS = 3
"""Health checks for each discovery: a new model is served within that many intervals."""


class Worker:
    """One worker process's work. `run` from start to drained."""

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
    ) -> None:
        """`adapts`: parameters that the server lacks are replaced by their nearest equivalent, not refused."""
        self.id = worker_id
        self._host = host
        self._backend = backend
        self._blobs = blobs
        self._log = log
        self._registry = registry
        self._metrics = metrics
        self._beat_s = ack_wait_s / 3
        self._wanted_slots = slots
        self._health_interval_s = health_interval_s
        self._drain_s = drain_s
        # Only a server that says what it holds can be seen to swap.
        says = type(backend).resident_models is not Backend.resident_models
        self._turns = ModelTurns(swap_patience_s) if says else None
        self._load_began = asyncio.Event()
        self._answered: set[str] = set()
        """Models of which a job has been completed since their load began."""
        self._bus: WorkerBus | None = None
        self._intake: Puller | None = None
        self._announcement: Announcement | None = None
        self._attempts: dict[tuple[str, int, int], Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._models: tuple[ModelOffer, ...] = ()
        self._last_model: str | None = None
        self._unnamed: set[str] = set()
        self._services: Mapping[str, ServiceRecord] = {}
        self._problems: tuple[str, ...] = ()
        self._shown_problems: tuple[str, ...] = ()
        self._next_trouble = 0.0
        self._limitations: tuple[Limitation, ...] = ()
        self._load_figures: BackendLoad | None = None
        self._pauses = ModelPauses()
        self._shown_pauses: tuple[Pause, ...] = ()
        self._next_loss = 0.0
        self._slots = 1
        self._state = WorkerState.UNHEALTHY
        self._identity = WorkerContext(worker_id, backend.name, adapts=adapts)
        self._draining = asyncio.Event()
        self._changed = asyncio.Event()
        backend.notify_changed = self._changed.set

    # Life

    async def run(self, bus: WorkerBus) -> None:
        """Serve until drained. `bus` delivers to `self.on_job`."""
        self._bus = bus
        await self._backend.start()
        await bus.start()
        await self._start_registry()
        await bus.subscribe_control(self.id, self._on_control)
        watcher = asyncio.create_task(self._watch())
        tasks = [asyncio.create_task(self._keep_healthy())]
        if self._turns is not None:
            tasks.append(asyncio.create_task(self._follow_loads(self._turns)))
        try:
            await self._draining.wait()
        finally:
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await self._leave()
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
            await bus.close()
            await self._registry.close()
            await self._backend.close()

    async def _start_registry(self) -> None:
        """With a backend that follows services, watch them."""
        follows = self._backend.follows_services
        await self._registry.start(watch=follows)
        if follows:
            self._registry.subscribe(self._services_seen)
            self._services_seen(self._registry.snapshot or RegistrySnapshot())

    def _services_seen(self, snapshot: RegistrySnapshot) -> None:
        if snapshot.services != self._services:
            self._services = snapshot.services
            self._backend.services_changed(snapshot.services)
            self._changed.set()

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the worker is unhealthy, or what a ready one does not serve."""
        return self._problems

    @property
    def standing(self) -> str:
        """`ready`: takes jobs; `starting`; `disconnected` from NATS; `unhealthy`: its backend does not answer; `draining`."""
        if self._draining.is_set():
            return WorkerState.DRAINING.value
        if self._bus is None or self._announcement is None:
            return "starting"
        return self._state.value if self._bus.connected else "disconnected"

    def drain(self) -> None:
        """Leave: registry first, then no new jobs, then finish those in hand. A second call ends those too."""
        if self._draining.is_set():
            for attempt in list(self._attempts.values()):
                attempt.stop(StopReason.DRAINED)
        self._draining.set()

    async def _leave(self) -> None:
        self._state = WorkerState.DRAINING
        log.info("worker.draining", worker=self.id, running=len(self._attempts))
        if self._intake is not None:
            self._intake.pause()
        if self._announcement is not None:
            await self._announcement.withdraw()
        if self._intake is not None:
            await self._intake.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._drain_s)
        for attempt in list(self._attempts.values()):
            attempt.stop(StopReason.DRAINED)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=3.0)
        log.info("worker.drained", worker=self.id, left=len(self._attempts))

    # Health and presence

    async def _keep_healthy(self) -> None:
        """Ask the backend again and again: what it serves, now and then; whether it answers, in between."""
        silent, next_discovery = 0, 0.0
        while True:
            try:
                async with asyncio.timeout(HEALTH_LIMIT_S):
                    changed = self._changed.is_set()
                    if self._state is not WorkerState.READY or changed or monotonic() >= next_discovery:
                        self._changed.clear()
                        missing = await asyncio.to_thread(missing_requirements, self._backend)
                        loads_before = self._turns.loads_begun if self._turns is not None else 0
                        discovery = await self._backend.discover()
                        self._learn(discovery.models, loads_before)
                        next_discovery = monotonic() + DISCOVER_INTERVALS * self._health_interval_s
                        self._tell(discovery.problems + optional_problems(missing, discovery.models))
                        await self._serve(discovery.models, discovery.slots)
                    else:
                        await self._backend.health()
                        self._open_intake()
                silent = 0
            except TimeoutError as error:
                # A server at full load may be slow to say how it is.
                silent += 1
                if silent >= SILENT_TRIES or self._state is not WorkerState.READY:
                    await self._unhealthy(error)
            except Exception as error:
                await self._unhealthy(error)
            # Soon while the backend is away, so that it serves again soon after it is back.
            well = self._state is WorkerState.READY and self._intake is not None and self._intake.is_open
            pause = self._health_interval_s if well else min(1.0, self._health_interval_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()

    async def _serve(self, models: tuple[ModelOffer, ...], slots: int | None) -> None:
        """The backend is well, and this is what it serves."""
        assert self._bus is not None
        slots = self._wanted_slots or slots or self._backend.default_slots
        models = tuple(model for model in models if self._can_name(model))
        if self._backend.manages_models:
            models += (ModelOffer(name=f"worker:{self.id}", capabilities=(Capability.MODELS,)),)
        changed = self._intake is None or models != self._models or slots != self._slots
        self._metrics.backend_up.labels(self._backend.name).set(1)
        self._metrics.slots.set(slots)
        if self._intake is None:
            self._intake = Puller(self._bus, slots, self._loaded)
        self._intake.take_turns(self._turns if self._turns is not None and self._turns.needed else None)
        if changed:
            self._models, self._slots = models, slots
            queues = [Queue(c, lane, m.name) for m in models for c in m.capabilities for lane in LANES]
            await self._intake.serve(queues, slots)
            log.info("worker.serving", worker=self.id, models=[m.name for m in models], slots=slots)
        if self._state is not WorkerState.READY or changed or self._problems != self._shown_problems:
            self._state = WorkerState.READY
            await self._announce()
        self._open_intake()

    def _open_intake(self) -> None:
        """Take jobs, also again after a connection was lost: the backend is well."""
        if self._intake is not None:
            self._intake.open()

    def _tell(self, problems: tuple[str, ...]) -> None:
        """Log each problem once, and that all are over."""
        problems = shown(problems)
        for problem in problems:
            if problem not in self._problems:
                log.warning("worker.problem_found", worker=self.id, problem=problem)
        if self._problems and not problems and self._state is WorkerState.READY:
            log.info("worker.problems_solved", worker=self.id)
        self._problems = problems

    def _can_name(self, model: ModelOffer) -> bool:
        """Whether a subject can hold the model's name; the others are served all the same."""
        try:
            encode_model(model.name)
        except NexusError as error:
            if model.name not in self._unnamed:
                self._unnamed.add(model.name)
                log.warning("worker.model_name_rejected", model=model.name, error=error.info.message)
            return False
        return True

    async def _unhealthy(self, error: Exception) -> None:
        self._metrics.backend_up.labels(self._backend.name).set(0)
        if isinstance(error, TimeoutError):
            message = f"the backend did not say how it is within {HEALTH_LIMIT_S:g} s"
        else:
            message = error.info.message if isinstance(error, NexusError) else f"{type(error).__name__}: {error}"
        problems, now = shown((message,)), monotonic()
        newly = self._state is WorkerState.READY or self._announcement is None
        another = problems != self._problems and now >= self._next_trouble
        if newly or another:
            log.warning("worker.backend_unavailable", worker=self.id, backend=self._backend.name, error=message)
            self._next_trouble = now + TROUBLE_LOG_S
        if self._intake is not None:
            self._intake.pause()
        self._problems = problems
        if newly or another:
            self._state = WorkerState.UNHEALTHY
            await self._announce()

    async def _announce(self) -> None:
        self._load_figures = self._backend.load_figures()
        presence = WorkerPresence(
            id=self.id,
            backend=self._backend.name,
            host=self._host,
            pid=os.getpid(),
            version=VERSION,
            slots=self._slots,
            busy=len(self._attempts),
            load=self._load_figures,
            models=self._models,
            state=self._state,
            limitations=self._limitations,
            pauses=self._shown_pauses,
            problems=self._problems,
        )
        self._shown_problems = self._problems
        if self._announcement is None:
            self._announcement = await self._registry.announce(presence)
        else:
            await self._announcement.update(presence)

    def _learn(self, models: tuple[ModelOffer, ...], loads_before: int) -> None:
        """Tell the turns which models the server may load and unload, and those that it holds, unless a load has begun meanwhile."""
        if self._turns is None:
            return
        swappable = frozenset(model.name for model in models if model.loaded is not None or model.loading)
        resident = frozenset(model.name for model in models if model.loaded or model.loading)
        self._turns.serve(swappable, resident if self._turns.loads_begun == loads_before else None)

    async def _follow_loads(self, turns: ModelTurns) -> None:
        """While the server loads a model for a job, see which models it holds: that shows whether they fit beside each other."""
        while True:
            await self._load_began.wait()
            self._load_began.clear()
            self._answered.clear()
            pause = LOAD_LOOK_S
            while turns.loading:
                loaded = {model for model in turns.loading if self._is_loaded(model)}
                if turns.saw(await self._resident(), loaded, monotonic()):
                    self._changed.set()
                self._answered -= loaded
                if self._intake is not None:
                    self._intake.refill()
                await asyncio.sleep(pause)
                pause = min(2 * pause, LOAD_LOOK_MAX_S)

    async def _resident(self) -> frozenset[str] | None:
        """Return the models that the server holds; None where it does not say now."""
        try:
            async with asyncio.timeout(HEALTH_LIMIT_S):
                return await self._backend.resident_models()
        except Exception as error:  # whatever an adapter raises: loads must be followed on
            log.debug("worker.resident_models_unknown", worker=self.id, error=str(error))
            return None

    def _is_loaded(self, model: str) -> bool:
        """Return whether a load is over: a job of the model has begun to answer, or has ended well, or none is left."""
        if model in self._answered:
            return True
        attempts = [attempt for attempt in self._attempts.values() if attempt.envelope.model == model]
        return not attempts or any(attempt.answers for attempt in attempts)

    def _loaded(self) -> frozenset[str]:
        """What the backend holds in memory; where it does not say, what it ran last."""
        if self._turns is not None and self._turns.resident:
            return self._turns.resident
        said = frozenset(m.name for m in self._models if m.loaded)
        if said or any(m.loaded is False for m in self._models):
            return said
        return frozenset((self._last_model,)) if self._last_model else frozenset()

    # Jobs

    def on_job(self, job: JobDelivery) -> None:
        """A job has arrived: begin it, or give it back when there is no slot."""
        if self._intake is None or not self._intake.arrived(job):
            job.nak(NO_SLOT_DELAY_S)
            return
        if self._turns is not None and self._turns.loading:
            self._load_began.set()
        try:
            envelope, body = Envelope.decode(job.message)
        except ValueError as error:
            # It can never run, and nobody can be told: the envelope holds the address.
            log.error("worker.malformed_job_dropped", queue=job.queue, error=str(error))
            job.ack()
            self._intake.done(job.queue.model)
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
        if envelope.durable:
            return DurableAttempt(bus, self._log, self._blobs, self._backend, self._identity, job, envelope, body)
        return Attempt(bus, self._blobs, self._backend, self._identity, job, envelope, body)

    async def _run(self, attempt: Attempt) -> None:
        env, job_model = attempt.envelope, attempt.job.queue.model
        self._metrics.busy.inc()
        try:
            await attempt.run()
        finally:
            self._metrics.busy.dec()
            self._attempts.pop((env.job, env.run, attempt.job.delivery), None)
            if attempt.failure is not None:
                self._backend_failed(env.model, attempt.failure)
            elif attempt.outcome == "completed":
                self._pauses.succeeded(env.model)
                if self._turns is not None and self._turns.loading:
                    self._answered.add(env.model)
            if self._intake is not None:
                self._intake.done(job_model)
            # After the loop's turn that sends the last word: nobody waits for our bookkeeping.
            asyncio.get_running_loop().call_soon(self._account, attempt, monotonic())

    def _backend_failed(self, model: str, error: BackendError) -> None:
        """Leave the model's queue where its server asks to wait, and every queue where the server may be gone."""
        if self._intake is None:
            return
        if isinstance(error, BackendUnavailable) and error.pause_s is not None:
            wait_s = self._pauses.ask_to_wait(model, error.pause_s, error.info.message)
            log.warning("worker.model_paused", worker=self.id, model=model, seconds=wait_s, error=error.info.message)
            self._intake.pause_model(model, wait_s)
        elif is_unreachable(error) and self._loses_server(error):
            wait_s = self._pauses.lost_server()
            log.warning("worker.backend_lost", worker=self.id, model=model, error=error.info.message)
            self._intake.pause_model(model, wait_s)
            if self._backend.single_server:
                self._intake.pause()  # until the health check that follows at once
            self._changed.set()

    def _loses_server(self, error: BackendError) -> bool:
        """A request that makes a server break its connection does not keep a worker from its queues for long."""
        now = monotonic()
        if not (isinstance(error, BackendUnavailable) and error.unsent) and now < self._next_loss:
            return False
        self._next_loss = now + LOSS_S
        return True

    def _account(self, attempt: Attempt, ended: float) -> None:
        env, metrics = attempt.envelope, self._metrics
        attempt.report(ended)
        metrics.attempts.labels(env.capability, env.model, attempt.outcome).inc()
        metrics.seconds.labels(env.capability, env.model).observe(ended - attempt.began)
        if attempt.error is not None:
            metrics.backend_errors.labels(self._backend.name, attempt.error.code or "invalid_request").inc()

    async def _watch(self) -> None:
        """Time limits, heartbeats, and the registry's view of how busy we are."""
        next_beat = monotonic() + self._beat_s
        announced, next_update, next_pauses = 0, 0.0, 0.0
        while True:
            await asyncio.sleep(min(WATCH_S, self._beat_s / 2))
            now = monotonic()
            beat = now >= next_beat
            if beat:
                next_beat = now + self._beat_s
            for attempt in list(self._attempts.values()):
                attempt.watch(now)
                if beat:
                    attempt.beat()
            busy, limitations = len(self._attempts), self._backend.limitations()[:MAX_LIMITATIONS]
            pauses, load = self._pauses.shown()[:MAX_LIMITATIONS], self._backend.load_figures()
            changed = now >= next_update and (
                busy != announced or limitations != self._limitations or load != self._load_figures
            )
            changed = changed or (now >= next_pauses and pauses != self._shown_pauses)
            if changed and self._announcement and self._state is WorkerState.READY:
                announced, next_update, next_pauses = busy, now + BUSY_UPDATE_S, now + PAUSES_UPDATE_S
                self._limitations, self._shown_pauses = limitations, pauses
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
        for (job, run, _), attempt in list(self._attempts.items()):
            if (job, run) == (control.job, control.run):
                attempt.stop(StopReason.CANCELLED)


class RequirementMissing(BackendUnavailable):
    """The worker's machine lacks something that its adapter needs."""


def missing_requirements(backend: Backend) -> list[tuple[Requirement, str]]:
    """Return the optional requirements that are missing, each with its problem. Raises RequirementMissing for the others."""
    found = [(one, problem) for one in backend.requirements() if (problem := one.problem()) is not None]
    if required := [problem for one, problem in found if not one.optional]:
        raise RequirementMissing(f"The {backend.name} adapter cannot work yet. {' '.join(required)}")
    return found


def optional_problems(missing: list[tuple[Requirement, str]], models: tuple[ModelOffer, ...]) -> tuple[str, ...]:
    """Return the problems of the requirements that matter to these models."""
    served = {capability for model in models for capability in model.capabilities}
    return tuple(problem for one, problem in missing if not one.capabilities or served & set(one.capabilities))


def shown(problems: tuple[str, ...]) -> tuple[str, ...]:
    """Return as much of the problems as the registry holds."""
    return tuple(problem[:MAX_PROBLEM] for problem in problems[:MAX_LIMITATIONS])
