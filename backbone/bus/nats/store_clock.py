"""Estimates how long ago NATS stored a message, without a clock that both sides share."""

from __future__ import annotations

MAX_CLOCK_DRIFT = 100e-6
"""Seconds by which two clocks may drift apart in one second."""


class StoreClock:
    """Estimates the age of messages from NATS's timestamps.

    A message that is delivered at once shows the smallest difference between this process's monotonic clock and the timestamps;
    a greater difference is the time that a message has waited. The smallest difference may grow by MAX_CLOCK_DRIFT, so that
    clocks that drift, or are set, are followed: until then messages seem older than they are, never younger.
    """

    def __init__(self) -> None:
        self._smallest_difference: float | None = None
        self._seen_at = 0.0

    def age_s(self, stored_ns: int, now: float) -> float:
        """Return for how many seconds the message has waited. The first message may have waited for any time: `inf`."""
        difference = now - stored_ns / 1e9
        smallest = self._smallest_difference
        if smallest is None:
            self._smallest_difference, self._seen_at = difference, now
            return float("inf")
        smallest = min(difference, smallest + MAX_CLOCK_DRIFT * (now - self._seen_at))
        self._smallest_difference, self._seen_at = smallest, now
        return difference - smallest
