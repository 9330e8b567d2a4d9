"""Implement the registry in memory, for one process and for tests. Registries that share a hub see each other."""

from __future__ import annotations

from collections.abc import Callable

from backbone.registry.snapshot import RegistryState, catalog_entry, cataloged_offers
from schemas.errors import Unavailable
from schemas.presence import Alias, CatalogEntry, ModelHold, RegistrySnapshot, ServiceRecord, WorkerPresence


class MemoryHub:
    """The data that the registries of one test or process share, instead of a server."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerPresence] = {}
        self.models: dict[str, CatalogEntry] = {}
        self.aliases: dict[str, Alias] = {}
        self.services: dict[str, ServiceRecord] = {}
        self.holds: dict[str, ModelHold] = {}
        self.descriptors: dict[str, bytes] = {}
        self.registries: set[MemoryRegistry] = set()
        self.announcements: dict[str, MemoryAnnouncement] = {}
        self._available = True

    @property
    def available(self) -> bool:
        """Return whether the hub answers. Set it to simulate an outage."""
        return self._available

    @available.setter
    def available(self, value: bool) -> None:
        self._available = value
        if value:
            self.sync()

    def sync(self) -> None:
        """Publish what is announced to every registry. Do nothing during an outage."""
        if not self._available:
            return
        self.workers = {id_: announcement.presence for id_, announcement in self.announcements.items()}
        described = ((id_, one.descriptors) for id_, one in self.announcements.items())
        self.descriptors = {id_: descriptors for id_, descriptors in described if descriptors}
        for presence in self.workers.values():
            for offer in cataloged_offers(presence):
                self.models[offer.name] = catalog_entry(offer, self.models.get(offer.name))
        for registry in list(self.registries):
            registry.refresh()


class MemoryAnnouncement:
    """A worker's entry in a hub: see `backbone.registry.registry.Announcement`."""

    def __init__(self, hub: MemoryHub, presence: WorkerPresence) -> None:
        self._hub = hub
        self.presence = presence
        self.descriptors = b""

    async def update(self, presence: WorkerPresence) -> None:
        self.presence = presence
        self._hub.sync()

    async def describe(self, descriptors: bytes) -> None:
        self.descriptors = descriptors
        self._hub.sync()

    async def withdraw(self) -> None:
        if self._hub.announcements.get(self.presence.id) is self:
            del self._hub.announcements[self.presence.id]
            self._hub.sync()


class MemoryRegistry:
    """One process's access to a hub: see `backbone.registry.registry.Registry`."""

    def __init__(self, hub: MemoryHub | None = None) -> None:
        """Join `hub`, or create one."""
        self.hub = hub or MemoryHub()
        self._state = RegistryState()
        self._announcements: list[MemoryAnnouncement] = []

    @property
    def snapshot(self) -> RegistrySnapshot | None:
        return self._state.snapshot

    @property
    def connected(self) -> bool:
        return self.hub.available

    async def start(self, *, watch: bool = True) -> None:
        """Follow the hub if `watch` is set."""
        if watch:
            self.hub.registries.add(self)
            if self.hub.available:
                self.refresh()

    async def close(self) -> None:
        """Stop following the hub, and withdraw this registry's announcements, as the end of a lease does."""
        self.hub.registries.discard(self)
        for announcement in self._announcements:
            await announcement.withdraw()

    def subscribe(self, listener: Callable[[RegistrySnapshot], None]) -> Callable[[], None]:
        return self._state.subscribe(listener)

    async def announce(self, presence: WorkerPresence) -> MemoryAnnouncement:
        announcement = MemoryAnnouncement(self.hub, presence)
        self._announcements.append(announcement)
        self.hub.announcements[presence.id] = announcement
        self.hub.sync()
        return announcement

    async def put_alias(self, alias: Alias) -> None:
        await self.ping()
        self.hub.aliases[alias.name] = alias
        self.hub.sync()

    async def remove_alias(self, name: str) -> bool:
        await self.ping()
        found = self.hub.aliases.pop(name, None)
        self.hub.sync()
        return found is not None

    async def put_service(self, record: ServiceRecord) -> None:
        await self.ping()
        self.hub.services[record.name] = record
        self.hub.sync()

    async def remove_service(self, name: str) -> bool:
        await self.ping()
        found = self.hub.services.pop(name, None)
        self.hub.sync()
        return found is not None

    async def put_hold(self, hold: ModelHold) -> None:
        await self.ping()
        self.hub.holds[hold.model] = hold
        self.hub.sync()

    async def remove_hold(self, model: str) -> bool:
        await self.ping()
        found = self.hub.holds.pop(model, None)
        self.hub.sync()
        return found is not None

    async def ping(self) -> None:
        """Raise Unavailable while `available` is False."""
        if not self.hub.available:
            raise Unavailable("The memory registry is away.")

    def refresh(self) -> None:
        """Take over the hub's state and publish it."""
        hub = self.hub
        self._state.replace(
            hub.workers, hub.models, hub.aliases, hub.services, hub.holds, hub.descriptors, after_outage=False
        )
        self._state.publish()
