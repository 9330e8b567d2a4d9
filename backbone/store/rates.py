"""Share limits per minute among gateways: each takes a share ahead of need, and gives back what it did not use.

Guarantees of every implementation:
- What gateways have taken and not given back never exceeds the limit in any 60 seconds, by the store's own clock, but for what they
  report as `owed`.
- A clock that jumps ahead frees the limit once; a clock that jumps back delays nothing for more than 61 seconds.
- Each call ends within about two seconds: it raises Unavailable when the store is away, frozen or slow.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class RateShare(NamedTuple):
    """The answer to a request for a share."""

    granted: int
    free: int
    """What nobody has taken, after the grant."""
    wait_s: float
    """Seconds until the needed amount is free if nobody gives anything back; 0 if it was granted."""


class RateStore(Protocol):
    """Holds what was taken of each limit in the last minute."""

    async def take(self, name: str, limit: int, *, need: int, wanted: int, owed: int = 0, unused: int = 0) -> RateShare:
        """Take a share of `limit`, named `name`: at least `need` or nothing, up to `wanted` or half of what is free.

        `unused` of earlier shares is given back first, and `owed`, which was used without a share, is counted.
        """
