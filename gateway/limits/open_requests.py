"""Limit the requests that keys and teams have open at the same time, in one process."""

from __future__ import annotations

from collections import Counter

from gateway.limits.effective import Bound, EffectiveLimits
from schemas.errors import RateLimited


class OpenRequestLimiter:
    """Counts open requests."""

    def __init__(self, counted: str = "open requests") -> None:
        """Begin without requests. `counted` names them in errors."""
        self._counted = counted
        self._open: Counter[str] = Counter()

    def acquire(self, limits: EffectiveLimits) -> tuple[Bound, ...]:
        """Count an open request. Returns what `release` takes when it has ended. Raises RateLimited."""
        bounds = limits.open
        for name, most in bounds:
            if self._open[name] >= most:
                holder = "API key" if name.startswith("key:") else "team"
                raise RateLimited(
                    f"This {holder} has {most} {self._counted}, its limit `max_open` at each gateway process. Retry when one has ended."
                )
        for name, _ in bounds:
            self._open[name] += 1
        return bounds

    def release(self, bounds: tuple[Bound, ...]) -> None:
        """Count the end of an open request."""
        for name, _ in bounds:
            left = self._open[name] - 1
            if left > 0:
                self._open[name] = left
            else:
                del self._open[name]
