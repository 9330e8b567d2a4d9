"""The broadcast protocol: short notifications to every gateway, the sender included.

A notification says only that something about a topic has changed; the receiver reads the new state itself. A notification arrives
within milliseconds, once or several times, or not at all, so that receivers poll at a low rate as well. After a lost connection,
every subscriber is called, since notifications may have been missed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

BroadcastCallback = Callable[[], None]


class Broadcast(Protocol):
    """Sends and receives notifications. A topic is one token of `[a-z-]`."""

    def publish(self, topic: str) -> None:
        """Send a notification. Best effort; never raises."""

    async def subscribe(self, topic: str, callback: BroadcastCallback) -> None:
        """Call `callback` on each notification about this topic from now on. It must return at once and must not raise.

        Raises Unavailable.
        """
