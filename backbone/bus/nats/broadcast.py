"""Broadcasts to every gateway on core NATS."""

from __future__ import annotations

import contextlib

from backbone.bus.broadcast import BroadcastCallback
from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.subjects import BROADCAST
from schemas.errors import Unavailable


class NatsBroadcast:
    """Broadcasts on core NATS."""

    def __init__(self, server: NatsAccess | str, name: str) -> None:
        self._connection = NatsConnection(
            server, f"{name}-notices", on_reconnect=self._reconnected, monitor_liveness=True
        )
        self._callbacks: list[BroadcastCallback] = []

    async def start(self) -> None:
        """Connect. Raises Unavailable."""
        await self._connection.connect()

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.close()

    def publish(self, topic: str) -> None:
        """Publish an empty message on the topic's subject."""
        with contextlib.suppress(Unavailable):
            self._connection.publish(f"{BROADCAST}.{topic}".encode(), b"")

    async def subscribe(self, topic: str, callback: BroadcastCallback) -> None:
        """Subscribe, and wait until the server has the subscription."""
        await self._connection.subscribe(f"{BROADCAST}.{topic}", lambda *_: callback())
        await self._connection.ping()
        self._callbacks.append(callback)

    async def _reconnected(self) -> None:
        for callback in self._callbacks:
            callback()
