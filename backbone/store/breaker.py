"""A circuit breaker: after a call that timed out, the next calls fail at once for a while."""

from __future__ import annotations

import time
from collections.abc import Callable


class CircuitBreaker:
    """closed -> (time-out) -> open -> (after `open_s`) -> one trial call -> closed, or open again.

    Only time-outs open it: immediate errors cost nothing.
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
        """Return whether a call may be made now. While open, one trial call per `open_s` is allowed."""
        if self._opened_at is None:
            return True
        if self._clock() - self._opened_at < self._open_s:
            return False
        self._opened_at = self._clock()
        return True

    def record_answer(self) -> None:
        """Record a call that was answered in time, with a result or an error."""
        self._opened_at = None

    def record_timeout(self) -> None:
        """Record a call that timed out."""
        self._opened_at = self._clock()
