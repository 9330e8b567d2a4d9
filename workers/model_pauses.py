"""Models whose jobs this worker leaves in their queues for now, and for how long: pure decisions.

| the server | the model's jobs wait |
|---|---|
| says `Retry-After`, or that it loads the model | as long as it says, at most `MAX_PAUSE_S`; from the sixth time in a row on, 2 s, 4 s, … up to 30 s at least |
| refuses the connection, or breaks it before an answer | 0.1 s, 0.2 s, … up to 5 s, and until it answers a health check |

An attempt that succeeds begins both rows anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from schemas.presence import Pause

MAX_PAUSE_S = 600.0
"""After this, one more job asks the server, whatever it said."""
MIN_PAUSE_S = 0.5
PATIENCE = 5
"""Pauses in a row that are as short as the server says."""
LONGEST_FLOOR_S = 30.0
FIRST_ABSENCE_S, LONGEST_ABSENCE_S = 0.1, 5.0
REASON_LENGTH = 200


class ModelPauses:
    """One worker's pauses, by model. Times are `now`'s, in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._until: dict[str, float] = {}
        self._shown: dict[str, Pause] = {}
        self._in_a_row: dict[str, int] = {}
        self._absences = 0

    def ask_to_wait(self, model: str, pause_s: float, reason: str) -> float:
        """Note that the server asks to be left alone with the model. Return the seconds to wait from now."""
        count = self._in_a_row[model] = self._in_a_row.get(model, 0) + 1
        floor_s = min(LONGEST_FLOOR_S, 2.0 ** min(10, count - PATIENCE)) if count > PATIENCE else MIN_PAUSE_S
        wait_s = min(MAX_PAUSE_S, max(pause_s, floor_s))
        until = self._now() + wait_s
        if until > self._until.get(model, 0.0):
            self._until[model] = until
            self._shown[model] = Pause(
                model=model, reason=reason[:REASON_LENGTH], seconds=round(wait_s, 1), until=int(time.time() + wait_s)
            )
        return self._until[model] - self._now()

    def lost_server(self) -> float:
        """Note that the server is not reached. Return the seconds to wait after it is well again."""
        self._absences += 1
        return min(LONGEST_ABSENCE_S, FIRST_ABSENCE_S * 2.0 ** min(10, self._absences - 1))

    def succeeded(self, model: str) -> None:
        """Note that an attempt ended well."""
        if self._absences:
            self._absences = 0
        if self._in_a_row:
            self._in_a_row.pop(model, None)

    def shown(self) -> tuple[Pause, ...]:
        """Return the pauses that servers asked for and that are not over, for the registry."""
        if not self._until:
            return ()
        now = self._now()
        for model in [model for model, until in self._until.items() if until <= now]:
            del self._until[model], self._shown[model]
        return tuple(pause for _, pause in sorted(self._shown.items()))
