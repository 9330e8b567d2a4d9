"""The state of a registry and its listeners, shared by every implementation. Nothing here waits.

Workers that an outage hides are retained: a registry that comes back, wiped or with lapsed leases, lists fewer workers than there
are, until each has written its entry again. So workers that were there before stay for `retain_s` after it is back, unless they
left in order (their last state was DRAINING), and the gateway never sees them flap.
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
    ModelHold,
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

    def __init__(self, retain_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with no snapshot. `retain_s`: seconds for which the missing workers of an outage stay."""
        self.snapshot: RegistrySnapshot | None = None
        self._retain_s = retain_s
        self._clock = clock
        self._workers: dict[str, WorkerPresence] = {}
        self._models: dict[str, CatalogEntry] = {}
        self._aliases: dict[str, Alias] = {}
        self._services: dict[str, ServiceRecord] = {}
        self._holds: dict[str, ModelHold] = {}
        self._descriptors: dict[str, bytes] = {}
        self._retained: set[str] = set()
        self._retain_until = 0.0
        self._listeners: dict[object, SnapshotListener] = {}

    def subscribe(self, listener: SnapshotListener) -> Callable[[], None]:
        """Call `listener` after each change. Returns a function that ends this."""
        token = object()
        self._listeners[token] = listener
        return lambda: void(self._listeners.pop(token, None))

    def replace(
        self,
        workers: Mapping[str, WorkerPresence],
        models: Mapping[str, CatalogEntry],
        aliases: Mapping[str, Alias] | None = None,
        services: Mapping[str, ServiceRecord] | None = None,
        holds: Mapping[str, ModelHold] | None = None,
        descriptors: Mapping[str, bytes] | None = None,
        *,
        after_outage: bool,
    ) -> None:
        """Take a complete listing. After an outage, missing workers are retained."""
        if after_outage:
            self._retain_until = self._clock() + self._retain_s
        missing = {id_: presence for id_, presence in self._workers.items() if id_ not in workers}
        self._retained = {id_ for id_, presence in missing.items() if self._may_be_retained(presence)}
        self._workers = {id_: missing[id_] for id_ in self._retained} | dict(workers)
        self._models = dict(models)
        self._aliases = dict(aliases or {})
        self._services = dict(services or {})
        self._holds = dict(holds or {})
        self._descriptors = dict(descriptors or {})

    def put_worker(self, presence: WorkerPresence) -> None:
        """Add or replace a worker."""
        self._retained.discard(presence.id)
        self._workers[presence.id] = presence

    def remove_worker(self, worker_id: str) -> None:
        """Remove a worker. Shortly after an outage, retain it: its lease may just have lapsed."""
        presence = self._workers.get(worker_id)
        if presence is not None and self._may_be_retained(presence):
            self._retained.add(worker_id)
        else:
            self._workers.pop(worker_id, None)

    def put_model(self, entry: CatalogEntry) -> None:
        """Add or replace a catalog entry."""
        self._models[entry.name] = entry

    def remove_model(self, name: str) -> None:
        """Remove a catalog entry."""
        self._models.pop(name, None)

    def put_alias(self, alias: Alias) -> None:
        """Add or replace an alias."""
        self._aliases[alias.name] = alias

    def remove_alias(self, name: str) -> None:
        """Remove an alias."""
        self._aliases.pop(name, None)

    def put_service(self, record: ServiceRecord) -> None:
        """Add or replace a service's record."""
        self._services[record.name] = record

    def remove_service(self, name: str) -> None:
        """Remove a service's record."""
        self._services.pop(name, None)

    def put_hold(self, hold: ModelHold) -> None:
        """Add or replace a hold."""
        self._holds[hold.model] = hold

    def remove_hold(self, model: str) -> None:
        """Remove a hold."""
        self._holds.pop(model, None)

    def put_descriptors(self, worker_id: str, value: bytes) -> None:
        """Add or replace the descriptors of a worker's models."""
        self._descriptors[worker_id] = value

    def remove_descriptors(self, worker_id: str) -> None:
        """Remove the descriptors of a worker's models."""
        self._descriptors.pop(worker_id, None)

    def remaining_retention_s(self) -> float | None:
        """Return the seconds until retained workers are dropped; None when there are none."""
        return max(0.0, self._retain_until - self._clock()) if self._retained else None

    def drop_expired_workers(self) -> None:
        """Drop the retained workers whose time is over."""
        if self._retained and self._clock() >= self._retain_until:
            log.info("registry.workers_lost", workers=sorted(self._retained))
            for worker_id in self._retained:
                self._workers.pop(worker_id, None)
            self._retained.clear()

    def publish(self) -> None:
        """Make the snapshot, and call the listeners if it differs from the last one."""
        last = self.snapshot
        now = (self._workers, self._models, self._aliases, self._services, self._holds, self._descriptors)
        if last and (last.workers, last.models, last.aliases, last.services, last.holds, last.descriptors) == now:
            return
        self.snapshot = RegistrySnapshot(
            workers=dict(self._workers),
            models=dict(self._models),
            aliases=dict(self._aliases),
            services=dict(self._services),
            holds=dict(self._holds),
            descriptors=dict(self._descriptors),
        )
        for listener in list(self._listeners.values()):
            try:
                listener(self.snapshot)
            except Exception:
                log.exception("registry.listener_failed")

    def _may_be_retained(self, presence: WorkerPresence) -> bool:
        return presence.state is not WorkerState.DRAINING and self._clock() < self._retain_until


def void(_: object) -> None:
    """Turn an expression into a statement."""


def cataloged_offers(presence: WorkerPresence) -> frozenset[ModelOffer]:
    """Return the offers for the catalog: all but that to manage models, which disappears with its worker."""
    return frozenset(offer for offer in presence.models if set(offer.capabilities) - {Capability.MODELS})


def catalog_entry(offer: ModelOffer, known: CatalogEntry | None) -> CatalogEntry:
    """Return the catalog entry of a model with one more worker's offer: capabilities only ever grow."""
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
