"""That this gateway is about to end, which everybody should know before it does."""

from __future__ import annotations


class Leaving:
    """Not yet, or for good. Readiness says so, and connections are not kept for another request."""

    def __init__(self) -> None:
        self.begun = False

    def begin(self) -> None:
        """From now on. Idempotent."""
        self.begun = True
