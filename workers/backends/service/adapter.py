"""HTTP services of any kind: those that the registry holds under `services/`, all by one worker.

Each service is asked whether it is ready (`/readyz`) and what it offers (`/v1/metadata`); docs/reference/service-api.md specifies its answers. Their
models together are the models of this adapter. Of two services with one model, the first ready one by name serves it; where it fails before any
output, the other one does.

Each service has as many slots as its metadata's `concurrency`, or its record's, else `default_slots`. A changed record makes a new instance of its
service: running requests end where they began.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager

from schemas.descriptors import ModelDescriptor
from schemas.frames import Progress
from schemas.parameters.standard import features_of, standard_descriptor
from schemas.presence import Limitation, ModelOffer, ServiceRecord
from workers.adapter_kit.descriptors import DescriptorCache
from workers.adapter_kit.requirements import AUDIO_CODECS, OPTIONAL_PILLOW
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendUnavailable,
    Chunk,
    Discovery,
    ModelNotServed,
    Output,
    Requirement,
    Task,
)
from workers.backends.service.instance import ServiceInstance
from workers.backends.service.parameters import with_fields

QUEUED_INTERVAL_S = 5.0
"""How often a request that waits for a slot yields progress."""


class ServiceBackend(Backend):
    """Serve every registered service. See the module's docstring."""

    name = "service"
    option_names = frozenset()
    follows_services = True
    single_server = False

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError for a URL or an option: this adapter has none."""
        super().__init__(config)
        if config.url:
            raise ValueError("the service adapter takes no URL; register services with `nexus services add`")
        self._instances: dict[str, ServiceInstance] = {}
        self._descriptors = DescriptorCache()
        self._invalid: dict[str, str] = {}
        """Records that cannot be used, with the reason."""
        self._records: Mapping[str, ServiceRecord] = {}
        self._retired: list[ServiceInstance] = []
        self._waiting: dict[asyncio.Event, None] = {}
        """Requests that wait for a slot, in their order."""

    async def close(self) -> None:
        for instance in (*self._instances.values(), *self._retired):
            await instance.close()

    def limitations(self) -> tuple[Limitation, ...]:
        """Return the features that probes found missing, over all services."""
        return tuple(one for instance in self._instances.values() for one in instance.limitations)

    # Discovery

    def services_changed(self, services: Mapping[str, ServiceRecord]) -> None:
        """Replace the instances of changed records. A replaced instance is closed when its requests have ended."""
        for name, record in self._records.items():
            if services.get(name) != record:
                self._invalid.pop(name, None)
                instance = self._instances.pop(name, None)
                if instance is not None:
                    self._retired.append(instance)
        for name, record in services.items():
            if name in self._instances or name in self._invalid:
                continue
            try:
                self._instances[name] = ServiceInstance(name, record, self.config.api_key)
            except ValueError as error:
                self._invalid[name] = f"its record is wrong: {error}"
        self._records = dict(services)
        self._wake()

    def requirements(self) -> tuple[Requirement, ...]:
        """Return the libraries that convert audio and images, for services that generate any."""
        return (AUDIO_CODECS, OPTIONAL_PILLOW)

    async def discover(self) -> Discovery:
        """Return the models of all ready services. Raises BackendUnavailable when there are services and none is ready."""
        await self._close_idle()
        await asyncio.gather(*(instance.poll() for instance in self._instances.values()))
        self._wake()
        self._require_ready_service()
        ready = self._ready()
        offers: dict[str, ModelOffer] = {}
        for offer in (one for instance in ready if instance.metadata is not None for one in instance.metadata.models):
            if not self.config.models or offer.name in self.config.models:
                offers[offer.name] = _merge_offers(offers.get(offer.name), offer)
        return Discovery(tuple(offers.values()), sum(map(self._slots, ready)) or None, self._problems())

    def describe(self, offer: ModelOffer) -> ModelDescriptor | None:
        """Return the usual parameters of the model's endpoints, as the first ready service that has it describes them."""
        owners = (one.metadata for one in self._ready() if one.offers(offer.name))
        metadata = next((one for one in owners if one is not None), None)
        usual = standard_descriptor(offer.capabilities, features_of(offer))
        if metadata is None or usual is None:
            return usual
        own = {path: one for path, one in usual.endpoints.items() if path in metadata.endpoints} or usual.endpoints
        state = (
            offer.capabilities,
            features_of(offer),
            own.keys(),
            metadata.parameters,
            metadata.fields,
            metadata.required,
        )
        return self._descriptors.get(
            offer.name, state, lambda: with_fields(own, metadata.fields, metadata.required) | dict(metadata.parameters)
        )

    async def health(self) -> None:
        """Poll all services. Raises BackendUnavailable when there are services and none is ready."""
        before = self._ready()
        await asyncio.gather(*(instance.check() for instance in self._instances.values()))
        if self._ready() != before:
            self.notify_changed()
        self._require_ready_service()

    def _ready(self) -> list[ServiceInstance]:
        return [instance for _, instance in sorted(self._instances.items()) if instance.ready]

    def _problems(self) -> tuple[str, ...]:
        found = self._invalid | {
            name: instance.problem for name, instance in self._instances.items() if not instance.ready
        }
        described = [
            f"{name}: {problem}"
            for name, instance in sorted(self._instances.items())
            if instance.ready and instance.metadata is not None
            for problem in instance.metadata.problems
        ]
        return (*(f"{name}: {problem}" for name, problem in sorted(found.items())), *described)

    def _require_ready_service(self) -> None:
        if self._records and not self._ready():
            raise BackendUnavailable(f"no service is ready; {'; '.join(self._problems())}")

    def _slots(self, instance: ServiceInstance) -> int:
        return instance.slots or self.default_slots

    async def _close_idle(self) -> None:
        """Close the retired instances without running requests."""
        done = [instance for instance in self._retired if not instance.running]
        self._retired = [instance for instance in self._retired if instance.running]
        for instance in done:
            await instance.close()

    # Work

    async def run(self, task: Task) -> AsyncIterator[Output]:
        """Run a task on the first ready instance with the model and a free slot, or on the next one where that fails before any output."""
        new = [instance for instance in self._instances.values() if not instance.polled]
        await asyncio.gather(*(instance.poll() for instance in new))
        failed: set[ServiceInstance] = set()
        while True:
            with self._wait_turn() as turn:
                while (instance := self._free_instance(task, failed)) is None:
                    if not await _wait_for_slot(turn):
                        yield Progress(phase="queued", message="waiting for a slot of the service")
                instance.running += 1
            has_output = False
            try:
                async with aclosing(instance.answer(task)) as outputs:
                    async for output in outputs:
                        has_output = has_output or (isinstance(output, Chunk) and bool(output.data))
                        yield output
                return
            except BackendError as error:
                if not error.transient:
                    raise
                failed.add(instance)
                if isinstance(error, BackendUnavailable) and error.pause_s is not None:
                    instance.pause(task.model, error.pause_s)
                else:
                    self.notify_changed()  # it may be down: the discovery that follows shows it
                if has_output or not any(one.ready and one not in failed for one in self._instances_with_model(task)):
                    raise
            finally:
                instance.running -= 1
                self._wake()

    def _instances_with_model(self, task: Task) -> list[ServiceInstance]:
        """Return the instances with the model, in order of preference."""
        if self.config.models and task.model not in self.config.models:
            return []
        return [instance for _, instance in sorted(self._instances.items()) if instance.offers(task.model)]

    def _free_instance(self, task: Task, failed: set[ServiceInstance]) -> ServiceInstance | None:
        """Return the instance to use now; None while all are busy. Raises BackendError when there is no usable instance."""
        owners = self._instances_with_model(task)
        if not owners:
            unknown = [instance for instance in self._instances.values() if instance.metadata is None]
            if unknown and not self.config.models:
                message = f"no service that is ready has {task.model!r}; {'; '.join(self._problems())}"
                raise BackendUnavailable(message, unsent=not failed)
            raise ModelNotServed(f"no service has the model {task.model!r}", param="model")
        ready = [instance for instance in owners if instance.ready and instance not in failed]
        if not ready:
            message = "; ".join(f"the service {one.name} is not ready: {one.problem}" for one in owners)
            raise BackendUnavailable(message, unsent=not failed)
        available = [instance for instance in ready if not instance.waits_s(task.model)]
        if not available:
            left_s = min(filter(None, (instance.waits_s(task.model) for instance in owners)))
            message = f"every service that has {task.model!r} asked to wait"
            raise BackendUnavailable(message, retry_after_s=left_s, pause_s=left_s)
        ready = available
        suitable = [instance for instance in ready if instance.serves(task.endpoint)] or ready
        return next((instance for instance in suitable if instance.running < self._slots(instance)), None)

    @contextmanager
    def _wait_turn(self) -> Iterator[asyncio.Event]:
        """Provide an event that is set when a slot may be free. Waiting requests keep their order."""
        turn = asyncio.Event()
        self._waiting[turn] = None
        try:
            yield turn
        finally:
            del self._waiting[turn]

    def _wake(self) -> None:
        for turn in self._waiting:
            turn.set()


async def _wait_for_slot(turn: asyncio.Event) -> bool:
    """Return whether a slot may be free, after at most `QUEUED_INTERVAL_S`."""
    try:
        async with asyncio.timeout(QUEUED_INTERVAL_S):
            await turn.wait()
    except TimeoutError:
        return False
    turn.clear()
    return True


def _merge_offers(one: ModelOffer | None, other: ModelOffer) -> ModelOffer:
    """Return the offer of a model that two services have."""
    if one is None:
        return other
    return one.model_copy(update={"capabilities": tuple(dict.fromkeys((*one.capabilities, *other.capabilities)))})
