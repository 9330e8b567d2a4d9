"""The error for calls that need NATS while NATS is known to be away."""

from __future__ import annotations

from schemas.errors import Unavailable

RETRY_AFTER_S = 3.0
"""The `Retry-After` of refused requests: once NATS is back, each connection is back within this time."""


def nats_unavailable() -> Unavailable:
    """Return the error, which names NATS and the time to retry after."""
    return Unavailable(
        f"NATS, which holds the queue, cannot be reached; retry in {RETRY_AFTER_S:g} s",
        retry_after_s=RETRY_AFTER_S,
    )
