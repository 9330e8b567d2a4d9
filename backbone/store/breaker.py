"""A circuit breaker: after a call that ran into its time-out, the next ones fail at once for a while."""

from __future__ import annotations

import time
from collections.abc import Callable


class CircuitBreaker:
    """closed -> (timed out) -> open -> (after `rest_s`) -> one call tries -> closed, or open again.

    Only time-outs open it: errors that come at once cost nothing.
    """

    def __init__(self, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin closed."""
        self._open_s = open_s
        self._clock = clock
        self._opened_at: float | None = None

    @property
    def closed(self) -> bool:
        """Whether all calls may pass."""
        return self._opened_at is None

    def allows_call(self) -> bool:
        """Whether a call may be made now. While open, one per `rest_s` is let through to try."""
        if self._opened_at is None:
            return True
        if self._clock() - self._opened_at < self._open_s:
            return False
        self._opened_at = self._clock()
        return True

    def record_answer(self) -> None:
        """A call was answered in time, be it with an error."""
        self._opened_at = None

    def record_timeout(self) -> None:
        """A call was not answered in time."""
        self._opened_at = self._clock()
