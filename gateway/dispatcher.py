"""From a checked request to a job on the bus, and back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from time import monotonic

import structlog

from backbone.bus.bus import GatewayBus, Queue
from backbone.ids import new_job_id
from backbone.registry.registry import Registry
from gateway.http.inference_body import ReceivedRequest
from gateway.http.unread_budget import UnreadBudget
from gateway.metrics import GatewayMetrics
from gateway.model_catalog import CatalogModel, ModelCatalog
from gateway.paused_models import PausedModels
from gateway.sync.request_state import RequestState, SyncRequest
from schemas.errors import NexusError, Unavailable
from schemas.jobs import LANES, Capability, Envelope, Lane, Limits
from schemas.presence import RegistrySnapshot

log = structlog.get_logger(__name__)

TEXT = frozenset({Capability.CHAT, Capability.COMPLETIONS, Capability.EMBEDDINGS, Capability.RERANK})
CHECK_S = 0.25
DEPTHS_S = 5.0
NO_WORKER_S = 30.0
"""A request that was queued for a model whose workers have all gone waits this long for one to come back."""


class Dispatcher:
    """Submits calls, watches their clocks, and frees the queues of models that are gone."""

    def __init__(
        self,
        bus: GatewayBus,
        registry: Registry,
        metrics: GatewayMetrics,
        limits: Limits,
        ack_wait_s: float,
        *,
        media_timeout_s: float = 600.0,
        pull_timeout_s: float = 21_600.0,
        keep_s: float = 3600.0,
        queue_grace_s: float = 60.0,
        unread: UnreadBudget | None = None,
    ) -> None:
        self.bus = bus
        self.registry = registry
        self.catalog = ModelCatalog()
        self._paused = PausedModels()
        self._metrics = metrics
        self._limits = limits
        # Where there are no tokens, the first sign of life may be the whole answer.
        self._media_limits = limits.model_copy(
            update={
                "first_token_s": max(limits.first_token_s, media_timeout_s),
                "idle_s": max(limits.idle_s, media_timeout_s),
            }
        )
        self._pull_limits = self._media_limits.model_copy(update={"total_s": max(limits.total_s, pull_timeout_s)})
        self._keep_s = keep_s
        self._unread = unread
        self._ack_wait_s = ack_wait_s
        self._calls: set[SyncRequest] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._queue_grace_s = queue_grace_s
        self._unsubscribe: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Follow the registry, and watch clocks. The bus is up."""
        self._unsubscribe = self.registry.subscribe(self._on_snapshot)
        if self.registry.snapshot is not None:
            self._on_snapshot(self.registry.snapshot)
        for work in (self._check(), self._free_queues(), self._measure()):
            self._tasks.add(asyncio.create_task(work))

    async def close(self) -> None:
        """End what still runs."""
        self._unsubscribe()
        self.end_calls()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def end_calls(self) -> None:
        """Every open request ends, with an error that says why."""
        for call in list(self._calls):
            call.fail(Unavailable("the gateway is shutting down; try again", should_retry=True))

    def call(
        self,
        *,
        request_id: str,
        endpoint: str,
        capability: Capability,
        lane: Lane,
        public_model: str,
        stream: bool,
        owner: str,
        received: ReceivedRequest,
        hops: int = 0,
    ) -> SyncRequest:
        """Submit a request. Raises ModelNotFound, InvalidRequest, Unavailable, RequestTooLarge; QueueFull comes later, on the call."""
        model = self._serving(public_model, capability)
        limits = self.limits_of(capability)
        self._require_unpaused(model, limits.queue_s, monotonic())
        envelope = Envelope(
            job=new_job_id(),
            request_id=request_id,
            endpoint=endpoint,
            capability=capability,
            lane=lane,
            model=model,
            public_model=public_model,
            stream=stream,
            reply=self.bus.new_reply(),
            owner=owner,
            hops=hops,
            limits=limits,
            body_size=received.body_size,
            body_blob=received.body_blob,
            uploads=received.uploads,
            keep_s=self._keep_s,
        )
        if policy := self.catalog.unsupported(public_model):  # as a field of every envelope it would cost 2 µs
            envelope = envelope.model_copy(update={"unsupported": policy})
        call = SyncRequest(self.bus, envelope, self._ack_wait_s, self._unread)
        self.bus.submit(envelope, received.body, call)
        self._calls.add(call)
        return call

    def _serving(self, name: str, capability: Capability) -> str:
        """The model that serves it now. Counts what is refused for want of a worker."""
        try:
            return self.catalog.resolve(name, capability)
        except Unavailable:
            with contextlib.suppress(NexusError):
                model = self.catalog.resolve(name, capability, may_wait=True)
                self._metrics.child(self._metrics.unserved, capability.value, model).inc()
            raise

    def _require_unpaused(self, model: str, wait_s: float, now: float) -> None:
        """Raises Unavailable where no worker takes a job of the model within `wait_s`, as its servers have asked to wait."""
        resumes = self._paused.resumes_at(model)
        if resumes is not None and resumes > now + wait_s:
            raise Unavailable(
                f"The server of the model '{model[:100]}' asked for a pause of {resumes - now:.0f} s, longer than this"
                f" request may wait. Retry after it.",
                code="backend_unavailable",
                retry_after_s=resumes - now,
            )

    def limits_of(self, capability: Capability) -> Limits:
        """How long the parts of such a job's life may take."""
        if capability in TEXT:
            return self._limits
        return self._pull_limits if capability is Capability.MODELS else self._media_limits

    def finish(self, call: SyncRequest) -> None:
        """The caller's side is over, however it ended."""
        call.abandon()
        call.direct = None
        self._calls.discard(call)

    async def position(self, call: SyncRequest) -> int:
        """Jobs before this one in its queue, best effort: those waiting, less this gateway's own behind it."""
        waiting = 0
        for depth in await self.bus.depths():
            if depth.queue == call.queue:
                waiting = depth.waiting
        behind = sum(
            1
            for other in self._calls
            if other.queue == call.queue and other.state is RequestState.QUEUED and (other.seq or 0) > (call.seq or 0)
        )
        return max(0, waiting - 1 - behind)

    # The registry

    def _on_snapshot(self, snapshot: RegistrySnapshot) -> None:
        self.catalog.load(snapshot)
        self._paused.load(snapshot)

    def listed(self) -> list[CatalogModel]:
        """Return what callers may choose from, by name; without the models that have no queue where there is no room for one."""
        models = self.catalog.listed()
        if not self.bus.queues_are_full:
            return models
        return [model for model in models if self._has_queue(model)]

    def _has_queue(self, model: CatalogModel) -> bool:
        name = model.resolves_to or model.name
        queues = (Queue(capability, lane, name) for capability in model.live for lane in LANES)
        return any(not self.bus.refuses(queue) for queue in queues)

    async def _free_queues(self) -> None:
        """Free the queues of models that no live worker serves. A later request makes them again."""
        while True:
            await asyncio.sleep(max(1.0, self._queue_grace_s / 4))
            try:
                if self.registry.snapshot is not None:
                    await self.bus.free_queues(self._is_live, self._queue_grace_s)
            except NexusError as error:
                log.debug("queues not freed", error=error.info.message)
            except Exception:
                log.exception("defect in freeing queues")

    # Clocks

    async def _check(self) -> None:
        gone: dict[Queue, float] = {}
        while True:
            await asyncio.sleep(CHECK_S)
            now = monotonic()
            for call in list(self._calls):
                call.check(now)
                if call.state is RequestState.QUEUED:
                    if self._is_live(call.queue):
                        self._check_paused(call, now)
                    else:
                        self._check_orphan(call, gone.setdefault(call.queue, now), now)
            gone = {queue: since for queue, since in gone.items() if not self._is_live(queue)}

    def _check_paused(self, call: SyncRequest, now: float) -> None:
        """A pause that outlasts what `call` may wait ends it now."""
        left_s = call.queued_at + call.envelope.limits.queue_s - now
        try:
            self._require_unpaused(call.queue.model, left_s, now)
        except Unavailable as error:
            call.fail(error)

    def _check_orphan(self, call: SyncRequest, gone_since: float, now: float) -> None:
        """No worker serves what `call` waits for. One that restarts gets the time to; then the caller is told."""
        if call.returned is not None:
            # The backend failed, and by now no worker's backend is well: nobody would take the job for long.
            call.fail(NexusError.from_info(call.returned))
        elif now - gone_since > NO_WORKER_S:
            call.fail(Unavailable(f"the model '{call.queue.model}' has had no live worker for {NO_WORKER_S:g} s"))

    def _is_live(self, queue: Queue) -> bool:
        return self.catalog.is_live(queue.model, queue.capability)

    async def _measure(self) -> None:
        while True:
            for model in self.catalog.known():
                for capability in model.capabilities:
                    # From 0 on: what first appears as 1 does not count as an increase.
                    self._metrics.child(self._metrics.unserved, capability.value, model.name)
            with contextlib.suppress(Unavailable):
                self._metrics.set_depths(await self.bus.depths())
                self._metrics.queues.set(self.bus.queue_count)
            await asyncio.sleep(DEPTHS_S)
