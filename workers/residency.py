"""Which sets of models a server can hold in memory at once, learned from observation. Pure.

When the server has loaded a model, the models that are still in memory fit together; where one was unloaded, the earlier models and the
new one do not fit. The latest observation counts: memory changes, and so does the size of a model's context.
"""

from __future__ import annotations

MAX_SETS = 64
"""The most sets of models that are remembered of each kind; the oldest are forgotten."""

ModelSet = frozenset[str]


class Residency:
    """The knowledge about one server's memory."""

    def __init__(self) -> None:
        self._fitting: dict[ModelSet, None] = {}
        self._conflicting: dict[ModelSet, None] = {}

    @property
    def has_limit(self) -> bool:
        """Whether the server was seen to unload a model for another one, and that still counts."""
        return bool(self._conflicting)

    def fits(self, models: ModelSet) -> bool | None:
        """Return whether the server can hold these models at once; None where no observation shows it.

        Sets that were never observed are judged by their size.
        """
        if len(models) < 2 or any(models <= known for known in self._fitting):
            return True
        if any(known <= models for known in self._conflicting):
            return False
        if len(models) <= max(map(len, self._fitting), default=1):
            return True
        return False if self._conflicting else None

    def record_fitting(self, models: ModelSet) -> None:
        """Note that the server holds these models at once."""
        if len(models) < 2:
            return
        self._conflicting = {known: None for known in self._conflicting if not known <= models}
        _remember(self._fitting, models)

    def record_conflict(self, models: ModelSet) -> None:
        """Note that the server unloaded one of these models for another one."""
        self._fitting = {known: None for known in self._fitting if not models <= known}
        _remember(self._conflicting, models)


def _remember(sets: dict[ModelSet, None], models: ModelSet) -> None:
    sets.pop(models, None)
    sets[models] = None
    while len(sets) > MAX_SETS:
        del sets[next(iter(sets))]
