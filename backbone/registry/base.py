"""The registry seam: who is there, and what do they serve.

Guarantees, for every implementation:
- `start()` returns once the first snapshot is there, or keeps trying in the background when the registry is away
  (`snapshot` is then None). It never raises because the registry is away.
- `snapshot` is the newest known state. While the registry is away it keeps its last value; after a lost or compacted
  watch it is listed again. Listeners are called, on the event loop, after each change of it.
- An announcement survives a lost lease and a lost registry: it is written again when the registry is back.
- `withdraw()` removes the announcement at once (best effort when the registry is away: the lease ends it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from schemas.presence import Snapshot, WorkerPresence


class Announcement(Protocol):
    """A worker's entry, kept alive until withdrawn."""

    async def update(self, presence: WorkerPresence) -> None:
        """Replace the entry. Returns at once when the registry is away; the newest value is written later."""

    async def withdraw(self) -> None:
        """Remove the entry. Idempotent; returns within about two seconds, whatever the registry does."""


class Registry(Protocol):
    """See the module's docstring."""

    @property
    def snapshot(self) -> Snapshot | None:
        """The newest known state; None before the first one."""

    @property
    def connected(self) -> bool:
        """Whether the registry answered lately."""

    async def start(self, *, watch: bool = True) -> None:
        """Connect; with `watch`, follow the registry (gateways do, workers need not)."""

    async def close(self) -> None:
        """End the watch and every announcement's keepalive. Does not withdraw."""

    def subscribe(self, listener: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call `listener` after each change. Returns the function that ends it."""

    async def announce(self, presence: WorkerPresence) -> Announcement:
        """Enter a worker, under a lease, and its models into the catalogue. Never raises because the registry is away."""

    async def ping(self) -> None:
        """One active round trip within about a second. Raises Unavailable."""
