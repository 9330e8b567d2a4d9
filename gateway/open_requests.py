"""How many requests a key with limits has open in this process. A request that is answered later counts only until its 202."""

from __future__ import annotations

from collections import Counter

from gateway.auth import Principal
from schemas.errors import RateLimited


class OpenRequests:
    """Counts nothing for keys without limits: a key is bounded where it has both a `max_queued` and a `max_running`."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def enter(self, principal: Principal) -> Principal | None:
        """One more. Returns what `leave` must be given when it has ended; None: it is not counted. Raises RateLimited."""
        if principal.max_queued is None or principal.max_running is None:
            return None
        most = principal.max_queued + principal.max_running
        if self._open[principal.key_id] >= most:
            raise RateLimited(
                f"this API key has {most} requests open, as many as it may have; try again when one ended"
            )
        self._open[principal.key_id] += 1
        return principal

    def leave(self, principal: Principal) -> None:
        """One less."""
        left = self._open[principal.key_id] - 1
        if left > 0:
            self._open[principal.key_id] = left
        else:
            del self._open[principal.key_id]
