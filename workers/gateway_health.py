"""Which gateways answer, so that no backend works for callers whose gateway has died."""

from __future__ import annotations

MAX_REMEMBERED = 64
"""Gateways that do not answer are remembered, up to this many; a gateway that starts again has a new name."""


class GatewayHealth:
    """What this worker's questions have shown about gateways.

    A question that nobody listens for comes back at once. The gateway may only be reconnecting to NATS: from then on its
    jobs wait for its answer before they begin. Once it was asked in vain for long enough, it counts as gone, and one
    question decides about each of its other jobs. An answer makes all of it good.
    """

    def __init__(self) -> None:
        self._doubtful: dict[str, bool] = {}
        """Gateways without an answer; True: gone."""

    def answered(self, gateway: str) -> None:
        """Note that it is there."""
        if self._doubtful:
            self._doubtful.pop(gateway, None)

    def doubt(self, gateway: str, *, gone: bool = False) -> None:
        """Note that nobody listened to a question, or that all questions were in vain."""
        if gateway not in self._doubtful and len(self._doubtful) >= MAX_REMEMBERED:
            self._doubtful.pop(next(iter(self._doubtful)))
        self._doubtful[gateway] = gone or self._doubtful.get(gateway, False)

    def is_doubtful(self, gateway: str) -> bool:
        """Whether its jobs must wait for an answer."""
        return gateway in self._doubtful

    def is_gone(self, gateway: str) -> bool:
        """Whether it was asked in vain for long enough."""
        return self._doubtful.get(gateway, False)
