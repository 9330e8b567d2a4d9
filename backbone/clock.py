"""The one clock of all gateways: that of the NATS server which stores their jobs.

Hosts' clocks differ, by an hour where a time zone was mistaken for a time. What one process stores, another one compares:
so both have to read one clock. Everything stored in NATS carries its server's time already. A process measures how far its
own steady clock is from that, and adds the difference to whatever it stamps or compares. Where nothing was measured, as in
a command or a test, it is the host's own time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_GRADUAL_CORRECTION_S = 0.5
"""Smaller differences are approached, larger ones are taken over at once."""
CORRECTION_SHARE = 0.25
"""Of a small difference, what one measurement corrects."""


class Clock:
    """Unix seconds. Steps of the host's clock do not move it."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._steady = steady
        self._base = wall() - steady()

    def now(self) -> float:
        """Return the corrected time, in Unix seconds."""
        return self._steady() + self._base

    @property
    def ahead_s(self) -> float:
        """How far the host's own clock is ahead of this one; negative: behind."""
        return self._wall() - self.now()

    def steady(self) -> float:
        """Return the time by which `observe` is told when a question was sent, and when it was answered."""
        return self._steady()

    def observe(self, server_s: float, sent: float, received: float) -> None:
        """The server read `server_s` at some moment between these two of `steady`."""
        half = (received - sent) / 2
        error = server_s - (sent + half + self._base)
        if abs(error) <= half:
            return  # no more is known than before
        self._base += error * CORRECTION_SHARE if abs(error) < MAX_GRADUAL_CORRECTION_S else error


CLOCK = Clock()
"""This process's. A process has one clock, as it has one `time.time`."""


def now() -> float:
    """Return the corrected time, in Unix seconds."""
    return CLOCK.now()
