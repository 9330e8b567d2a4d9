"""Choose the queue and the limits of a request: the models that workers serve, the pauses of their servers, their queues."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

import structlog

from backbone.bus.bus import GatewayBus, Queue
from backbone.registry.registry import Registry
from gateway.descriptors.entries import CatalogEntries
from gateway.descriptors.reader import DescriptorReader
from gateway.metrics import GatewayMetrics
from gateway.model_catalog import CatalogModel, ModelCatalog
from gateway.paused_models import PausedModels
from schemas.endpoints import TIME_LIMITS, TimeLimits
from schemas.errors import InvalidRequest, NexusError, Unavailable
from schemas.jobs import LANES, Capability, Limits
from schemas.presence import ModelHold, RegistrySnapshot

log = structlog.get_logger(__name__)

MEASURE_INTERVAL_S = 5.0
HELD_RETRY_S = 60.0


class Dispatcher:
    """Resolves models to queues for synchronous requests and durable jobs, and frees the queues of models without workers."""

    def __init__(
        self,
        bus: GatewayBus,
        registry: Registry,
        metrics: GatewayMetrics,
        limits: Limits,
        *,
        media_timeout_s: float = 600.0,
        pull_timeout_s: float = 21_600.0,
        queue_grace_s: float = 60.0,
    ) -> None:
        """`queue_grace_s`: how long the queue of a model without live workers is kept."""
        self.bus = bus
        self.registry = registry
        self.catalog = ModelCatalog()
        self._paused = PausedModels()
        self._holds: Mapping[str, ModelHold] = {}
        self._descriptors = DescriptorReader()
        self.catalog_entries = CatalogEntries(self.catalog, self._paused, self._descriptors)
        self._metrics = metrics
        # Media are not made token by token: their first event may be the whole answer.
        media_limits = limits.model_copy(
            update={
                "first_token_s": max(limits.first_token_s, media_timeout_s),
                "idle_s": max(limits.idle_s, media_timeout_s),
            }
        )
        by_class = {
            TimeLimits.TEXT: limits,
            TimeLimits.MEDIA: media_limits,
            TimeLimits.DOWNLOAD: media_limits.model_copy(update={"total_s": max(limits.total_s, pull_timeout_s)}),
        }
        self._limits = {capability: by_class[time_limits] for capability, time_limits in TIME_LIMITS.items()}
        self._queue_grace_s = queue_grace_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsubscribe: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Follow the registry, free unused queues and measure them. The bus is up."""
        self._unsubscribe = self.registry.subscribe(self._load)
        if self.registry.snapshot is not None:
            self._load(self.registry.snapshot)
        for work in (self._free_queues(), self._measure()):
            self._tasks.add(asyncio.create_task(work))

    async def close(self) -> None:
        """Stop to follow the registry."""
        self._unsubscribe()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def resolve_live(self, name: str, capability: Capability) -> str:
        """Return the model that serves `name` now, and count requests that are refused because no worker is live.

        Raises ModelNotFound, InvalidRequest, Unavailable.
        """
        try:
            return self.catalog.resolve(name, capability)
        except Unavailable:
            with contextlib.suppress(NexusError):
                model = self.catalog.resolve(name, capability, may_wait=True)
                self._metrics.child(self._metrics.unserved, capability.value, model).inc()
            raise

    def require_in_bounds(self, model: str, path: str, values: Mapping[str, Any]) -> None:
        """Raise InvalidRequest for a parameter that every worker of the model certainly refuses, by their own descriptors."""
        violation = self._descriptors.violation(model, path, values)
        if violation is not None:
            name, must = violation
            raise InvalidRequest(
                f"'{name}' {must} for the model '{model[:100]}'. GET /v1/catalog/{model[:100]} shows its parameters.",
                param=name,
            )

    def require_unpaused(self, model: str, wait_s: float, now: float) -> None:
        """Raise Unavailable if an operator holds the model's jobs, or if its servers asked for pauses, so that no worker takes its
        jobs within `wait_s`.
        """
        if self._holds and (hold := self._holds.get(model)) is not None:
            raise _hold_error(hold)
        resumes = self._paused.resumes_at(model)
        if resumes is not None and resumes > now + wait_s:
            raise Unavailable(
                f"The server of the model '{model[:100]}' asked for a pause of {resumes - now:.0f} s, longer than this"
                f" request may wait. Retry after it.",
                code="backend_unavailable",
                retry_after_s=resumes - now,
            )

    def is_paused(self, model: str) -> bool:
        """Return whether all servers of the model asked to wait."""
        resumes = self._paused.resumes_at(model)
        return resumes is not None and resumes > monotonic()

    def is_held(self, model: str) -> bool:
        """Return whether an operator holds the model's waiting jobs."""
        return model in self._holds

    def limits_of(self, capability: Capability) -> Limits:
        """Return the time limits of a synchronous request for this capability."""
        return self._limits[capability]

    def list_models(self) -> list[CatalogModel]:
        """Return the models and aliases that callers may use, by name; without those whose queue cannot be made."""
        models = self.catalog.list_usable()
        if not self.bus.queues_are_full:
            return models
        return [model for model in models if self._has_queue(model)]

    def is_live(self, queue: Queue) -> bool:
        """Return whether a ready worker serves the queue's model and capability."""
        return self.catalog.is_live(queue.model, queue.capability)

    def _load(self, snapshot: RegistrySnapshot) -> None:
        self.catalog.load(snapshot)
        self._paused.load(snapshot)
        self._holds = snapshot.holds
        self._descriptors.load(snapshot)

    def _has_queue(self, model: CatalogModel) -> bool:
        name = model.resolves_to or model.name
        queues = (Queue(capability, lane, name) for capability in model.live for lane in LANES)
        return any(not self.bus.is_queue_refused(queue) for queue in queues)

    async def _free_queues(self) -> None:
        """Free the queues of models that no live worker serves. A later request makes them again."""
        while True:
            await asyncio.sleep(max(1.0, self._queue_grace_s / 4))
            try:
                if self.registry.snapshot is not None:
                    await self.bus.free_queues(self.is_live, self._queue_grace_s)
            except NexusError as error:
                log.debug("dispatcher.queues_not_freed", error=error.info.message)
            except Exception:
                log.exception("dispatcher.free_queues_failed")

    async def _measure(self) -> None:
        """Set the metrics of queues every few seconds."""
        while True:
            for model in self.catalog.list_known():
                for capability in model.capabilities:
                    # A counter must exist at 0: a first sample of 1 does not count as an increase.
                    self._metrics.child(self._metrics.unserved, capability.value, model.name)
            with contextlib.suppress(Unavailable):
                self._metrics.set_depths(await self.bus.queue_depths())
                self._metrics.queues.set(self.bus.queue_count)
            await asyncio.sleep(MEASURE_INTERVAL_S)


def _hold_error(hold: ModelHold) -> Unavailable:
    reason = f" ({hold.reason})" if hold.reason else ""
    return Unavailable(
        f"An operator holds the jobs of the model '{hold.model[:100]}' for now{reason}. Retry later, or send the request as a job"
        " (`Prefer: respond-async`): it waits until they are released.",
        code="model_held",
        retry_after_s=HELD_RETRY_S,
    )
