"""Detects a NATS server that no longer answers on a connection that still stands.

A frozen server, or a network that drops everything, leaves the connection open: nats-py notices after 10 to 15 seconds. The
monitor sends a ping every `TICK_INTERVAL_S` without received data, and gives the connection up after `MAX_SILENT_TICKS` ticks
without any. It counts ticks, not seconds, and only those that came on time: while this process got no CPU, the silence was its
own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

TICK_INTERVAL_S = 0.5
MAX_SILENT_TICKS = 4
"""A frozen server is given up after 2 to 2.5 seconds."""
MAX_TICK_DELAY_S = 0.25
"""A tick with a greater delay shows that this process itself stood still."""


class MonitoredConnection(Protocol):
    """The part of a connection that the monitor uses."""

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""

    def take_received(self) -> bool:
        """Return whether data has arrived since the last call."""

    def send_ping(self) -> None:
        """Ping the server."""

    async def give_up(self) -> None:
        """Drop the connection, and reconnect."""


class LivenessMonitor:
    """Monitors one connection. Call `run` once; it ends when it is cancelled."""

    def __init__(self, connection: MonitoredConnection, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._clock = clock
        self._silent_ticks = 0

    async def run(self) -> None:
        """Monitor until cancelled."""
        while True:
            due = self._clock() + TICK_INTERVAL_S
            await asyncio.sleep(TICK_INTERVAL_S)
            if self.tick(late_s=self._clock() - due):
                await self._connection.give_up()

    def tick(self, late_s: float) -> bool:
        """Check the connection once, and return whether the server has been silent for too long."""
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
