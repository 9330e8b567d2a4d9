"""What a registry knows, and who is told when it changes: the part that every implementation shares. Nothing here waits.

Workers that an outage hides are held: a registry that comes back, wiped or with lapsed leases, lists fewer workers than
there are, until each has entered itself again. So those that were there before stay for `hold_s` after it is back,
unless they left in order (their last word was DRAINING), and the gateway never sees them flap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import structlog

from schemas.jobs import Capability
from schemas.presence import (
    Alias,
    CatalogEntry,
    ModelOffer,
    RegistrySnapshot,
    ServiceRecord,
    WorkerPresence,
    WorkerState,
)

log = structlog.get_logger(__name__)

SnapshotListener = Callable[[RegistrySnapshot], None]
V = TypeVar("V")


class RegistryState:
    """The newest known state of the registry. Call `publish` after a batch of changes."""

    def __init__(self, hold_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with no snapshot. `hold_s`: seconds for which an outage's missing workers stay."""
        self.snapshot: RegistrySnapshot | None = None
        self._hold_s = hold_s
        self._clock = clock
        self._workers: dict[str, WorkerPresence] = {}
        self._models: dict[str, CatalogEntry] = {}
        self._aliases: dict[str, Alias] = {}
        self._services: dict[str, ServiceRecord] = {}
        self._held: set[str] = set()
        self._hold_until = 0.0
        self._listeners: dict[object, SnapshotListener] = {}

    def subscribe(self, listener: SnapshotListener) -> Callable[[], None]:
        """Call `listener` after each change. Returns the function that ends it."""
        token = object()
        self._listeners[token] = listener
        return lambda: void(self._listeners.pop(token, None))

    def replace(
        self,
        workers: Mapping[str, WorkerPresence],
        models: Mapping[str, CatalogEntry],
        aliases: Mapping[str, Alias] | None = None,
        services: Mapping[str, ServiceRecord] | None = None,
        *,
        after_outage: bool,
    ) -> None:
        """Take a complete listing. After an outage, workers that it lacks are held."""
        if after_outage:
            self._hold_until = self._clock() + self._hold_s
        missing = {id_: presence for id_, presence in self._workers.items() if id_ not in workers}
        self._held = {id_ for id_, presence in missing.items() if self._may_be_held(presence)}
        self._workers = {id_: missing[id_] for id_ in self._held} | dict(workers)
        self._models = dict(models)
        self._aliases = dict(aliases or {})
        self._services = dict(services or {})

    def put_worker(self, presence: WorkerPresence) -> None:
        """A worker entered or changed."""
        self._held.discard(presence.id)
        self._workers[presence.id] = presence

    def remove_worker(self, worker_id: str) -> None:
        """A worker's entry is gone. Shortly after an outage that may be its lapsed lease, and it is held."""
        presence = self._workers.get(worker_id)
        if presence is not None and self._may_be_held(presence):
            self._held.add(worker_id)
        else:
            self._workers.pop(worker_id, None)

    def put_model(self, entry: CatalogEntry) -> None:
        """A catalogue entry is new or changed."""
        self._models[entry.name] = entry

    def remove_model(self, name: str) -> None:
        """A catalogue entry is gone."""
        self._models.pop(name, None)

    def put_alias(self, alias: Alias) -> None:
        """An alias is new or changed."""
        self._aliases[alias.name] = alias

    def remove_alias(self, name: str) -> None:
        """An alias is gone."""
        self._aliases.pop(name, None)

    def put_service(self, record: ServiceRecord) -> None:
        """A service's record is new or changed."""
        self._services[record.name] = record

    def remove_service(self, name: str) -> None:
        """A service's record is gone."""
        self._services.pop(name, None)

    def remaining_hold_s(self) -> float | None:
        """Seconds until held workers are let go; None when there are none."""
        return max(0.0, self._hold_until - self._clock()) if self._held else None

    def drop_expired_holds(self) -> None:
        """Drop the held workers whose time is over."""
        if self._held and self._clock() >= self._hold_until:
            log.info("registry.workers_lost", workers=sorted(self._held))
            for worker_id in self._held:
                self._workers.pop(worker_id, None)
            self._held.clear()

    def publish(self) -> None:
        """Make the snapshot, and tell the listeners when it differs from the last one."""
        last = self.snapshot
        now = (self._workers, self._models, self._aliases, self._services)
        if last and (last.workers, last.models, last.aliases, last.services) == now:
            return
        self.snapshot = RegistrySnapshot(
            workers=dict(self._workers),
            models=dict(self._models),
            aliases=dict(self._aliases),
            services=dict(self._services),
        )
        for listener in list(self._listeners.values()):
            try:
                listener(self.snapshot)
            except Exception:
                log.exception("registry.listener_failed")

    def _may_be_held(self, presence: WorkerPresence) -> bool:
        return presence.state is not WorkerState.DRAINING and self._clock() < self._hold_until


def void(_: object) -> None:
    """Turn an expression into a statement."""


def cataloged_offers(presence: WorkerPresence) -> frozenset[ModelOffer]:
    """The offers that the catalogue remembers: all but that to manage models, which goes with its worker."""
    return frozenset(offer for offer in presence.models if set(offer.capabilities) - {Capability.MODELS})


def catalog_entry(offer: ModelOffer, known: CatalogEntry | None) -> CatalogEntry:
    """The catalogue's entry for a model after one more worker offers it: capabilities only ever grow."""
    if known is None:
        return CatalogEntry(
            name=offer.name,
            capabilities=tuple(sorted(set(offer.capabilities))),
            owned_by=offer.owned_by,
            created=offer.created,
        )
    return known.model_copy(
        update={
            "capabilities": tuple(sorted({*known.capabilities, *offer.capabilities})),
            "created": known.created or offer.created,
        }
    )


def joined_entry(entry: CatalogEntry, other: CatalogEntry | None) -> CatalogEntry:
    """Return `entry` with the capabilities of `other` as well."""
    if other is None:
        return entry
    capabilities = tuple(sorted({*entry.capabilities, *other.capabilities}))
    return entry.model_copy(update={"capabilities": capabilities, "created": other.created or entry.created})
