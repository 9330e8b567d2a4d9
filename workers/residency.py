"""Which models a server's memory has been seen to hold together, and which not. Pure.

It learns from what the server shows when it has loaded a model: the models that are still there fit beside each other; where one gave way, those that
were there and the new one do not. What was seen last counts: memory changes, and so does what a model needs.
"""

from __future__ import annotations

MAX_SETS = 64
"""So many sets of models are remembered of each kind, the newest."""

Models = frozenset[str]


class Residency:
    """What was learned about one server."""

    def __init__(self) -> None:
        self._together: dict[Models, None] = {}
        self._apart: dict[Models, None] = {}

    @property
    def knows_limit(self) -> bool:
        """Whether a model was ever seen to give way, and that still counts."""
        return bool(self._apart)

    def fits(self, models: Models) -> bool | None:
        """Return whether the server holds these at once; None where nothing was seen that tells.

        Sets that were never tried are judged by their size.
        """
        if len(models) < 2 or any(models <= seen for seen in self._together):
            return True
        if any(seen <= models for seen in self._apart):
            return False
        if len(models) <= max(map(len, self._together), default=1):
            return True
        return False if self._apart else None

    def seen_together(self, models: Models) -> None:
        """The server holds these at once."""
        if len(models) < 2:
            return
        self._apart = {seen: None for seen in self._apart if not seen <= models}
        _remember(self._together, models)

    def seen_apart(self, models: Models) -> None:
        """One of these gave way to another one."""
        self._together = {seen: None for seen in self._together if not models <= seen}
        _remember(self._apart, models)


def _remember(sets: dict[Models, None], models: Models) -> None:
    sets.pop(models, None)
    sets[models] = None
    while len(sets) > MAX_SETS:
        del sets[next(iter(sets))]
