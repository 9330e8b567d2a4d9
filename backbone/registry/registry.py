"""The registry seam: who is there, what do they serve, and what operators have entered.

Guarantees, for every implementation:
- `start()` returns once the first snapshot is there, or keeps trying in the background when the registry is away
  (`snapshot` is then None). It never raises because the registry is away.
- `snapshot` is the newest known state. While the registry is away it keeps its last value; after a lost or compacted
  watch it is listed again. Listeners are called, on the event loop, after each change of it.
- An announcement survives a lost lease and a lost registry: it is written again when the registry is back.
- `withdraw()` removes the announcement at once (best effort when the registry is away: the lease ends it).
- Aliases and service records have no lease: they stay until removed. `put_…` and `remove_…` return when the registry
  has taken the change and, where this one watches, `snapshot` shows it. They raise Unavailable when the registry is
  away; the change may have been taken all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from schemas.presence import Alias, RegistrySnapshot, ServiceRecord, WorkerPresence


class Announcement(Protocol):
    """A worker's entry, kept alive until withdrawn."""

    async def update(self, presence: WorkerPresence) -> None:
        """Replace the entry. Returns at once when the registry is away; the newest value is written later."""

    async def withdraw(self) -> None:
        """Remove the entry. Idempotent; returns within about two seconds, whatever the registry does."""


class Registry(Protocol):
    """See the module's docstring."""

    @property
    def snapshot(self) -> RegistrySnapshot | None:
        """The newest known state; None before the first one."""

    @property
    def connected(self) -> bool:
        """Whether the registry answered lately."""

    async def start(self, *, watch: bool = True) -> None:
        """Connect; with `watch`, follow the registry (gateways do, workers need not)."""

    async def close(self) -> None:
        """End the watch and every announcement's keepalive. Does not withdraw."""

    def subscribe(self, listener: Callable[[RegistrySnapshot], None]) -> Callable[[], None]:
        """Call `listener` after each change. Returns the function that ends it."""

    async def announce(self, presence: WorkerPresence) -> Announcement:
        """Enter a worker, under a lease, and its models into the catalogue. Never raises because the registry is away."""

    async def put_alias(self, alias: Alias) -> None:
        """Enter an alias, or replace the one of that name. Raises Unavailable."""

    async def remove_alias(self, name: str) -> bool:
        """Remove an alias; False when there is none of that name. Raises Unavailable."""

    async def put_service(self, record: ServiceRecord) -> None:
        """Enter a service's record, or replace the one of that name. Raises Unavailable."""

    async def remove_service(self, name: str) -> bool:
        """Remove a service's record; False when there is none of that name. Raises Unavailable."""

    async def ping(self) -> None:
        """One active round trip within about a second. Raises Unavailable."""
