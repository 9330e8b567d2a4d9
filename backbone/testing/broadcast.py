"""An in-memory broadcast. Gateways of one process share one instance."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from backbone.bus.broadcast import BroadcastCallback


class MemoryBroadcast:
    """Sends notifications to the subscribers of this process."""

    def __init__(self) -> None:
        self.available = True
        """Set to False for an outage: notifications are lost."""
        self._callbacks: defaultdict[str, list[BroadcastCallback]] = defaultdict(list)

    async def start(self) -> None:
        """Do nothing: there is no connection."""

    async def close(self) -> None:
        """Do nothing: there is no connection."""

    def publish(self, topic: str) -> None:
        """Call the topic's subscribers in the loop's next turn."""
        if self.available:
            for callback in self._callbacks[topic]:
                asyncio.get_running_loop().call_soon(callback)

    async def subscribe(self, topic: str, callback: BroadcastCallback) -> None:
        """Add a subscriber to the topic."""
        self._callbacks[topic].append(callback)
