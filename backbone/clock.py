"""The one clock of all gateways: that of the NATS server that stores their jobs.

Hosts' clocks differ, by an hour where a time zone was set wrong. One process compares times that another one stored, so both
have to read one clock. Everything that is stored in NATS carries its server's time. A process measures the difference between
its own monotonic clock and that time, and adds it to the times that it stores or compares. Without a measurement, as in a
command or a test, the clock shows the host's time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_GRADUAL_CORRECTION_S = 0.5
"""Smaller differences are corrected gradually, larger ones at once."""
CORRECTION_SHARE = 0.25
"""The share of a small difference that one measurement corrects."""


class Clock:
    """Unix seconds. Steps of the host's clock do not change it."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._steady = steady
        self._base = wall() - steady()

    def now(self) -> float:
        """Return the corrected time, in Unix seconds."""
        return self._steady() + self._base

    @property
    def ahead_s(self) -> float:
        """How far the host's clock is ahead of this one, in seconds; negative: behind."""
        return self._wall() - self.now()

    def steady(self) -> float:
        """Return monotonic seconds, for the `sent` and `received` of `observe`."""
        return self._steady()

    def observe(self, server_s: float, sent: float, received: float) -> None:
        """Correct the clock: the server read `server_s` at some moment between `sent` and `received`."""
        half = (received - sent) / 2
        error = server_s - (sent + half + self._base)
        if abs(error) <= half:
            return  # the measurement is not more precise than the clock
        self._base += error * CORRECTION_SHARE if abs(error) < MAX_GRADUAL_CORRECTION_S else error


CLOCK = Clock()
"""The clock of this process; a process has one, as it has one `time.time`."""


def now() -> float:
    """Return the corrected time, in Unix seconds."""
    return CLOCK.now()
