"""A registry without a server: for one process and for tests. Registries that share a hub see each other."""

from __future__ import annotations

from collections.abc import Callable

from backbone.registry.snapshot import RegistryState, catalog_entry, cataloged_offers
from schemas.errors import Unavailable
from schemas.presence import Alias, CatalogEntry, RegistrySnapshot, ServiceRecord, WorkerPresence


class MemoryHub:
    """What the registries of one test or process share, in the place of a server."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerPresence] = {}
        self.models: dict[str, CatalogEntry] = {}
        self.aliases: dict[str, Alias] = {}
        self.services: dict[str, ServiceRecord] = {}
        self.registries: set[MemoryRegistry] = set()
        self.announcements: dict[str, MemoryAnnouncement] = {}
        self._available = True

    @property
    def available(self) -> bool:
        """Whether the pretended server answers; set it to False and True again for an outage."""
        return self._available

    @available.setter
    def available(self, value: bool) -> None:
        self._available = value
        if value:
            self.sync()

    def sync(self) -> None:
        """Bring what is announced, and every registry's snapshot, up to date. Nothing happens during an outage."""
        if not self._available:
            return
        self.workers = {id_: announcement.presence for id_, announcement in self.announcements.items()}
        for presence in self.workers.values():
            for offer in cataloged_offers(presence):
                self.models[offer.name] = catalog_entry(offer, self.models.get(offer.name))
        for registry in list(self.registries):
            registry.refresh()


class MemoryAnnouncement:
    """A worker's entry in a hub."""

    def __init__(self, hub: MemoryHub, presence: WorkerPresence) -> None:
        self._hub = hub
        self.presence = presence

    async def update(self, presence: WorkerPresence) -> None:
        """Replace the entry."""
        self.presence = presence
        self._hub.sync()

    async def withdraw(self) -> None:
        """Remove the entry."""
        if self._hub.announcements.get(self.presence.id) is self:
            del self._hub.announcements[self.presence.id]
            self._hub.sync()


class MemoryRegistry:
    """See `backbone.registry.registry`."""

    def __init__(self, hub: MemoryHub | None = None) -> None:
        """Join `hub`; None: a hub of its own."""
        self.hub = hub or MemoryHub()
        self._view = RegistryState()
        self._announcements: list[MemoryAnnouncement] = []

    @property
    def snapshot(self) -> RegistrySnapshot | None:
        """The newest known state."""
        return self._view.snapshot

    @property
    def connected(self) -> bool:
        """Whether the hub pretends to answer."""
        return self.hub.available

    async def start(self, *, watch: bool = True) -> None:
        """With `watch`, follow the hub."""
        if watch:
            self.hub.registries.add(self)
            if self.hub.available:
                self.refresh()

    async def close(self) -> None:
        """Follow the hub no more. What was announced here vanishes, as it does when a lease ends."""
        self.hub.registries.discard(self)
        for announcement in self._announcements:
            await announcement.withdraw()

    def subscribe(self, listener: Callable[[RegistrySnapshot], None]) -> Callable[[], None]:
        """Call `listener` after each change."""
        return self._view.subscribe(listener)

    async def announce(self, presence: WorkerPresence) -> MemoryAnnouncement:
        """Enter a worker and its models; an older entry under the same id is replaced."""
        announcement = MemoryAnnouncement(self.hub, presence)
        self._announcements.append(announcement)
        self.hub.announcements[presence.id] = announcement
        self.hub.sync()
        return announcement

    async def put_alias(self, alias: Alias) -> None:
        """Enter or replace an alias."""
        await self.ping()
        self.hub.aliases[alias.name] = alias
        self.hub.sync()

    async def remove_alias(self, name: str) -> bool:
        """Remove an alias; whether there was one."""
        await self.ping()
        found = self.hub.aliases.pop(name, None)
        self.hub.sync()
        return found is not None

    async def put_service(self, record: ServiceRecord) -> None:
        """Enter or replace a service's record."""
        await self.ping()
        self.hub.services[record.name] = record
        self.hub.sync()

    async def remove_service(self, name: str) -> bool:
        """Remove a service's record; whether there was one."""
        await self.ping()
        found = self.hub.services.pop(name, None)
        self.hub.sync()
        return found is not None

    async def ping(self) -> None:
        """Raises Unavailable while the hub pretends to be away."""
        if not self.hub.available:
            raise Unavailable("the registry is away")

    def refresh(self) -> None:
        """Take the hub's state."""
        hub = self.hub
        self._view.replace(hub.workers, hub.models, hub.aliases, hub.services, after_outage=False)
        self._view.publish()
