"""The health of gateways, so that no backend works for callers whose gateway has died."""

from __future__ import annotations

MAX_REMEMBERED = 64
"""The most gateways without an answer that are remembered; a gateway that restarts has a new name."""


class GatewayHealth:
    """Knows which gateways have left requests of this worker unanswered.

    A request to a gateway that does not listen fails at once. The gateway may only be reconnecting to NATS: from then on its
    jobs wait for its answer before they start. After enough failed requests it counts as dead, and one request decides
    about each of its other jobs. An answer clears all of that.
    """

    def __init__(self) -> None:
        self._silent: dict[str, bool] = {}
        """Gateways without an answer; True: dead."""

    def record_answer(self, gateway: str) -> None:
        """Note that the gateway has answered."""
        if self._silent:
            self._silent.pop(gateway, None)

    def record_silence(self, gateway: str, *, disconnected: bool = False) -> None:
        """Note that the gateway did not listen to a request. `disconnected`: all requests have failed."""
        if gateway not in self._silent and len(self._silent) >= MAX_REMEMBERED:
            self._silent.pop(next(iter(self._silent)))
        self._silent[gateway] = disconnected or self._silent.get(gateway, False)

    def is_suspect(self, gateway: str) -> bool:
        """Return whether the gateway's jobs must wait for its answer."""
        return gateway in self._silent

    def is_dead(self, gateway: str) -> bool:
        """Return whether the gateway counts as dead."""
        return self._silent.get(gateway, False)
