"""Detect a NATS server that has stopped answering on a connection that still stands.

A frozen server, or a network that drops everything, leaves the connection open: nats-py notices after 10 to 15 seconds.
The pulse asks for a sign of life every `TICK_S` where none came by itself, and gives the connection up after `MAX_MISSED`
ticks without one. It counts ticks, not seconds, and only those that came on time: while this process itself got no CPU,
the silence was its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

TICK_INTERVAL_S = 0.5
MAX_SILENT_TICKS = 4
"""A frozen server is given up after 2 to 2.5 seconds."""
MAX_TICK_DELAY_S = 0.25
"""A tick that comes this much late says that this process stood still."""


class MonitoredConnection(Protocol):
    """What the pulse needs of a connection."""

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""

    def take_received(self) -> bool:
        """Return whether anything has arrived since the last call."""

    def send_ping(self) -> None:
        """Ask the server for a sign of life."""

    async def give_up(self) -> None:
        """Drop the connection, and connect again."""


class LivenessMonitor:
    """Watches one connection. Call `run` once; it ends when cancelled."""

    def __init__(self, connection: MonitoredConnection, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._clock = clock
        self._silent_ticks = 0

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            due = self._clock() + TICK_INTERVAL_S
            await asyncio.sleep(TICK_INTERVAL_S)
            if self.tick(late_s=self._clock() - due):
                await self._connection.give_up()

    def tick(self, late_s: float) -> bool:
        """Look at the connection once. Return whether the server has been silent for too long."""
        connection = self._connection
        if not connection.connected or connection.take_received():
            self._silent_ticks = 0
            return False
        if late_s < MAX_TICK_DELAY_S:
            self._silent_ticks += 1
        if self._silent_ticks > MAX_SILENT_TICKS:
            self._silent_ticks = 0
            return True
        connection.send_ping()
        return False
