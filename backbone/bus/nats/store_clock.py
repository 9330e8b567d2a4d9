"""How long ago NATS stored a message, told without a clock that both sides share."""

from __future__ import annotations

DRIFT = 100e-6
"""Seconds by which two clocks may part in a second."""


class StoreClock:
    """Estimate the age of messages from the stamps that NATS gave them.

    A message that is delivered at once shows the smallest difference between this process's monotonic clock and NATS's
    stamps; what another one shows beyond that is the time that it waited. The smallest difference may grow by DRIFT, so
    that clocks which part, or are set, are followed: until then messages seem older than they are, never younger.
    """

    def __init__(self) -> None:
        self._least: float | None = None
        self._seen_at = 0.0

    def age_s(self, stored_ns: int, now: float) -> float:
        """Return for how many seconds the message has waited. The first one seen may have waited for any time: `inf`."""
        difference = now - stored_ns / 1e9
        least = self._least
        if least is None:
            self._least, self._seen_at = difference, now
            return float("inf")
        least = min(difference, least + DRIFT * (now - self._seen_at))
        self._least, self._seen_at = least, now
        return difference - least
