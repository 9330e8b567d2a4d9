"""The registry protocol: live workers, their models, and the operators' aliases, services and holds.

Guarantees of every implementation:
- `start()` returns once the first snapshot is there, or retries in the background when the registry is away (`snapshot` is then
  None). It never raises because the registry is away.
- `snapshot` is the newest known state. While the registry is away it keeps its last value; after a lost or compacted watch the
  registry is listed again. Listeners are called, on the event loop, after each change of it.
- An announcement survives a lost lease and a lost registry: it is written again when the registry is back.
- `withdraw()` removes the announcement at once (best effort when the registry is away: the lease ends it).
- Aliases, service records and holds have no lease: they stay until they are removed. `put_…` and `remove_…` return when the registry
  has stored the change and, if this process watches, `snapshot` shows it. They raise Unavailable when the registry is away; the
  change may have been stored all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from schemas.presence import Alias, ModelHold, RegistrySnapshot, ServiceRecord, WorkerPresence


class Announcement(Protocol):
    """A worker's entry, renewed until it is withdrawn."""

    async def update(self, presence: WorkerPresence) -> None:
        """Replace the entry. Returns at once when the registry is away; the newest value is written later."""

    async def describe(self, descriptors: bytes) -> None:
        """Replace the descriptors of the worker's models, which stand beside the entry and vanish with it. Returns at once."""

    async def withdraw(self) -> None:
        """Remove the entry. Idempotent; returns within about two seconds, whatever the registry does."""


class Registry(Protocol):
    """Reads and writes the registry; see the module's docstring for the guarantees."""

    @property
    def snapshot(self) -> RegistrySnapshot | None:
        """The newest known state; None before the first one, and without `watch`."""

    @property
    def connected(self) -> bool:
        """Whether the registry answered recently."""

    async def start(self, *, watch: bool = True) -> None:
        """Connect; with `watch`, follow the registry (gateways do, workers need not)."""

    async def close(self) -> None:
        """End the watch and every announcement's renewal. Does not withdraw."""

    def subscribe(self, listener: Callable[[RegistrySnapshot], None]) -> Callable[[], None]:
        """Call `listener` after each change. Returns a function that ends this."""

    async def announce(self, presence: WorkerPresence) -> Announcement:
        """Write the entry of a worker under a lease, and its models into the catalog. Never raises because the registry is
        away.
        """

    async def put_alias(self, alias: Alias) -> None:
        """Write an alias, or replace the one of that name. Raises Unavailable."""

    async def remove_alias(self, name: str) -> bool:
        """Remove an alias; False when there is none of that name. Raises Unavailable."""

    async def put_service(self, record: ServiceRecord) -> None:
        """Write a service's record, or replace the one of that name. Raises Unavailable."""

    async def remove_service(self, name: str) -> bool:
        """Remove a service's record; False when there is none of that name. Raises Unavailable."""

    async def put_hold(self, hold: ModelHold) -> None:
        """Write the hold of a model's jobs, or replace it. Raises Unavailable."""

    async def remove_hold(self, model: str) -> bool:
        """Remove a hold; False when there is none. Raises Unavailable."""

    async def ping(self) -> None:
        """Make one round trip within about a second. Raises Unavailable."""
