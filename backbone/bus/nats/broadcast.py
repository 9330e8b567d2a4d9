"""The notice seam: short words to every gateway, this one included, on core NATS.

A notice says only that something has changed; whoever hears it looks for itself. It is heard within milliseconds, once or
more, or not at all: what depends on it looks now and then anyway. After a connection that was lost, every topic is heard,
since words may have been missed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.connection import NatsConnection
from schemas.errors import Unavailable

BROADCAST = "nexus.notice"
"""Before the topic, in the subject."""

BroadcastCallback = Callable[[], None]


class Broadcast(Protocol):
    """See the module's docstring. A topic is one word of `[a-z-]`."""

    def publish(self, topic: str) -> None:
        """Send a notice. Best effort; never raises."""

    async def subscribe(self, topic: str, heard: BroadcastCallback) -> None:
        """Call `heard` at each notice on this topic, from now on. It must return at once and not raise.

        Raises Unavailable.
        """


class NatsBroadcast:
    """See `Broadcast`."""

    def __init__(self, server: NatsAccess | str, name: str) -> None:
        self._wire = NatsConnection(server, f"{name}-notices", on_reconnect=self._reconnected, pulse=True)
        self._heard: list[BroadcastCallback] = []

    async def start(self) -> None:
        """Connect. Raises Unavailable."""
        await self._wire.connect()

    async def close(self) -> None:
        """Disconnect."""
        await self._wire.close()

    def publish(self, topic: str) -> None:
        """See the base."""
        with contextlib.suppress(Unavailable):
            self._wire.publish(f"{BROADCAST}.{topic}".encode(), b"")

    async def subscribe(self, topic: str, heard: BroadcastCallback) -> None:
        """See the base."""
        await self._wire.subscribe(f"{BROADCAST}.{topic}", lambda *_: heard())
        await self._wire.ping()
        self._heard.append(heard)

    async def _reconnected(self) -> None:
        for heard in self._heard:
            heard()


class MemoryBroadcast:
    """See `Broadcast`. Gateways of one process share one instance."""

    def __init__(self) -> None:
        self.available = True
        """Set to False for an outage: notices are lost."""
        self._heard: defaultdict[str, list[BroadcastCallback]] = defaultdict(list)

    async def start(self) -> None:
        """Nothing to connect."""

    async def close(self) -> None:
        """Nothing to disconnect."""

    def publish(self, topic: str) -> None:
        """See the base; heard in the loop's next turn."""
        if self.available:
            for heard in self._heard[topic]:
                asyncio.get_running_loop().call_soon(heard)

    async def subscribe(self, topic: str, heard: BroadcastCallback) -> None:
        """See the base."""
        self._heard[topic].append(heard)
