"""The error of what NATS is needed for while NATS is known to be away."""

from __future__ import annotations

from schemas.errors import Unavailable

RETRY_AFTER_S = 3.0
"""`Retry-After` of what is refused meanwhile: once NATS is back, each connection is back within this."""


def nats_unavailable() -> Unavailable:
    """Return the error, which says what is away and when to retry."""
    return Unavailable(
        f"NATS, which holds the queue, cannot be reached; retry in {RETRY_AFTER_S:g} s",
        retry_after_s=RETRY_AFTER_S,
    )
