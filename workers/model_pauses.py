"""Pauses of models, during which this worker leaves their jobs in the queues. Pure decisions.

| the server | pause of the model |
|---|---|
| sends `Retry-After`, or is loading the model | the server's time, at most `MAX_PAUSE_S`; from the sixth time in a row on, at least 2 s, 4 s, … up to 30 s |
| refuses the connection, or breaks it before an answer | 0.1 s, 0.2 s, … up to 5 s, and until it answers a health check |

A successful attempt resets both rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from schemas.presence import Pause

MAX_PAUSE_S = 600.0
"""After this time one job tries the server, even if it asked for a longer pause."""
MIN_PAUSE_S = 0.5
UNRAISED_PAUSES = 5
"""Pauses in a row that may be as short as the server asks."""
MAX_FLOOR_S = 30.0
FIRST_OUTAGE_PAUSE_S, MAX_OUTAGE_PAUSE_S = 0.1, 5.0
REASON_LENGTH = 200


class ModelPauses:
    """Keeps one worker's pauses, by model. `now` returns seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._until: dict[str, float] = {}
        self._published: dict[str, Pause] = {}
        self._in_a_row: dict[str, int] = {}
        self._outages = 0

    def record_wait_request(self, model: str, pause_s: float, reason: str) -> float:
        """Note that the server asks to pause the model. Return the seconds to wait from now."""
        count = self._in_a_row[model] = self._in_a_row.get(model, 0) + 1
        floor_s = min(MAX_FLOOR_S, 2.0 ** min(10, count - UNRAISED_PAUSES)) if count > UNRAISED_PAUSES else MIN_PAUSE_S
        wait_s = min(MAX_PAUSE_S, max(pause_s, floor_s))
        until = self._now() + wait_s
        if until > self._until.get(model, 0.0):
            self._until[model] = until
            self._published[model] = Pause(
                model=model, reason=reason[:REASON_LENGTH], seconds=round(wait_s, 1), until=int(time.time() + wait_s)
            )
        return self._until[model] - self._now()

    def record_lost_server(self) -> float:
        """Note that the server cannot be reached. Return the seconds to wait after it is healthy again."""
        self._outages += 1
        return min(MAX_OUTAGE_PAUSE_S, FIRST_OUTAGE_PAUSE_S * 2.0 ** min(10, self._outages - 1))

    def record_success(self, model: str) -> None:
        """Note that an attempt at a job of the model has succeeded."""
        if self._outages:
            self._outages = 0
        if self._in_a_row:
            self._in_a_row.pop(model, None)

    def active_pauses(self) -> tuple[Pause, ...]:
        """Return the pauses that servers asked for and that are not over, for the registry."""
        if not self._until:
            return ()
        now = self._now()
        for model in [model for model, until in self._until.items() if until <= now]:
            del self._until[model], self._published[model]
        return tuple(pause for _, pause in sorted(self._published.items()))
