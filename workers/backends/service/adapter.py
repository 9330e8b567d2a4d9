"""Anybody's HTTP services: those that the registry names under `services/`, all by one worker.

Each is asked whether it is ready (`/readyz`) and what it offers (`/v1/metadata`); docs/reference/service-api.md says what it must
answer. Their models together are what this adapter serves. Of two services with one model, the first by name that is ready
is asked; where it fails before anything has come, the other one is.

Each has as many slots as its metadata's `concurrency` says, or its record's, else `default_slots`. A record that changes
moves its service: requests under way end where they began.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager

from schemas.frames import Progress
from schemas.presence import Limitation, ModelOffer, ServiceRecord
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

QUEUED_S = 5.0
"""How often a request that waits for a slot says so."""


class ServiceBackend(Backend):
    """See the module's docstring."""

    name = "service"
    option_names = frozenset()
    follows_services = True
    single_server = False

    def __init__(self, config: BackendConfig) -> None:
        """Raises ValueError for what this adapter does not have."""
        super().__init__(config)
        if config.url:
            raise ValueError("the service adapter takes no URL: services are entered by `nexus services add`")
        self._places: dict[str, ServiceInstance] = {}
        self._wrong: dict[str, str] = {}
        """Records that cannot be used, and why."""
        self._records: Mapping[str, ServiceRecord] = {}
        self._retired: list[ServiceInstance] = []
        self._waiting: dict[asyncio.Event, None] = {}
        """Requests that wait for a slot, in their order."""

    async def close(self) -> None:
        for place in (*self._places.values(), *self._retired):
            await place.close()

    def limitations(self) -> tuple[Limitation, ...]:
        """What probes have shown that models of any service lack."""
        return tuple(one for place in self._places.values() for one in place.limitations)

    # What there is

    def services_changed(self, services: Mapping[str, ServiceRecord]) -> None:
        """Leave the places of changed records to the requests that they still have, and begin at the new ones."""
        for name, record in self._records.items():
            if services.get(name) != record:
                self._wrong.pop(name, None)
                place = self._places.pop(name, None)
                if place is not None:
                    self._retired.append(place)
        for name, record in services.items():
            if name in self._places or name in self._wrong:
                continue
            try:
                self._places[name] = ServiceInstance(name, record, self.config.api_key)
            except ValueError as error:
                self._wrong[name] = f"its record is wrong: {error}"
        self._records = dict(services)
        self._wake()

    def requirements(self) -> tuple[Requirement, ...]:
        """The libraries that convert sounds and pictures, for services that make any."""
        return (AUDIO_CODECS, OPTIONAL_PILLOW)

    async def discover(self) -> Discovery:
        """The models of every service that is ready. Raises BackendUnavailable when there are services and none is."""
        await self._sweep()
        await asyncio.gather(*(place.look() for place in self._places.values()))
        self._wake()
        self._require_any()
        ready = self._ready()
        offers: dict[str, ModelOffer] = {}
        for offer in (one for place in ready if place.advert is not None for one in place.advert.models):
            if not self.config.models or offer.name in self.config.models:
                offers[offer.name] = _joined(offers.get(offer.name), offer)
        return Discovery(tuple(offers.values()), sum(map(self._slots, ready)) or None, self._problems())

    async def health(self) -> None:
        """Raises BackendUnavailable when there are services and none is ready."""
        before = self._ready()
        await asyncio.gather(*(place.check() for place in self._places.values()))
        if self._ready() != before:
            self.notify_changed()
        self._require_any()

    def _ready(self) -> list[ServiceInstance]:
        return [place for _, place in sorted(self._places.items()) if place.ready]

    def _problems(self) -> tuple[str, ...]:
        found = self._wrong | {name: place.problem for name, place in self._places.items() if not place.ready}
        return tuple(f"{name}: {problem}" for name, problem in sorted(found.items()))

    def _require_any(self) -> None:
        if self._records and not self._ready():
            raise BackendUnavailable(f"no service is ready; {'; '.join(self._problems())}")

    def _slots(self, place: ServiceInstance) -> int:
        return place.slots or self.default_slots

    async def _sweep(self) -> None:
        """Forget the places that nothing runs at any more."""
        done = [place for place in self._retired if not place.running]
        self._retired = [place for place in self._retired if place.running]
        for place in done:
            await place.close()

    # Work

    async def run(self, task: Task) -> AsyncIterator[Output]:
        """By the first place that has the model, is ready and has a slot; by the next one where that fails at once."""
        new = [place for place in self._places.values() if not place.looked]
        await asyncio.gather(*(place.look() for place in new))
        failed: set[ServiceInstance] = set()
        while True:
            with self._turn() as turn:
                while (place := self._free(task, failed)) is None:
                    if not await _came(turn):
                        yield Progress(phase="queued", message="waiting for a slot of the service")
                place.running += 1
            shown = False
            try:
                async with aclosing(place.answer(task)) as outputs:
                    async for output in outputs:
                        shown = shown or (isinstance(output, Chunk) and bool(output.data))
                        yield output
                return
            except BackendError as error:
                if not error.transient:
                    raise
                failed.add(place)
                if isinstance(error, BackendUnavailable) and error.pause_s is not None:
                    place.pause(task.model, error.pause_s)
                else:
                    self.notify_changed()  # it may be down: soon it is known
                if shown or not any(one.ready and one not in failed for one in self._having(task)):
                    raise
            finally:
                place.running -= 1
                self._wake()

    def _having(self, task: Task) -> list[ServiceInstance]:
        """The places that have the model, in the order in which they are asked."""
        if self.config.models and task.model not in self.config.models:
            return []
        return [place for _, place in sorted(self._places.items()) if place.offers(task.model)]

    def _free(self, task: Task, failed: set[ServiceInstance]) -> ServiceInstance | None:
        """Where to ask now; None while every place is busy. Raises BackendError when there is no place to ask."""
        having = self._having(task)
        if not having:
            unknown = [place for place in self._places.values() if place.advert is None]
            if unknown and not self.config.models:
                message = f"no service that is ready has {task.model!r}; {'; '.join(self._problems())}"
                raise BackendUnavailable(message, unsent=not failed)
            raise ModelNotServed(f"no service has the model {task.model!r}", param="model")
        ready = [place for place in having if place.ready and place not in failed]
        if not ready:
            message = "; ".join(f"the service {one.name} is not ready: {one.problem}" for one in having)
            raise BackendUnavailable(message, unsent=not failed)
        willing = [place for place in ready if not place.waits_s(task.model)]
        if not willing:
            left_s = min(filter(None, (place.waits_s(task.model) for place in having)))
            message = f"every service that has {task.model!r} asked to wait"
            raise BackendUnavailable(message, retry_after_s=left_s, pause_s=left_s)
        ready = willing
        able = [place for place in ready if place.serves(task.endpoint)] or ready
        return next((place for place in able if place.running < self._slots(place)), None)

    @contextmanager
    def _turn(self) -> Iterator[asyncio.Event]:
        """Set when a slot may have become free, for those who wait in the order in which they came."""
        turn = asyncio.Event()
        self._waiting[turn] = None
        try:
            yield turn
        finally:
            del self._waiting[turn]

    def _wake(self) -> None:
        for turn in self._waiting:
            turn.set()


async def _came(turn: asyncio.Event) -> bool:
    """Whether it came within `QUEUED_S`."""
    try:
        async with asyncio.timeout(QUEUED_S):
            await turn.wait()
    except TimeoutError:
        return False
    turn.clear()
    return True


def _joined(one: ModelOffer | None, other: ModelOffer) -> ModelOffer:
    """A model that two services have."""
    if one is None:
        return other
    return one.model_copy(update={"capabilities": tuple(dict.fromkeys((*one.capabilities, *other.capabilities)))})
