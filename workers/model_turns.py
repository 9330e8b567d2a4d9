"""Which models get jobs now, where a server cannot hold all of its models at once. Pure: no clock, no bus.

A model's group of jobs goes on as long as jobs of it wait. A model that does not fit beside those in use gets its turn

- when none of those in use, or loaded and wanted, is left;
- when its oldest job has waited for `patience_s`; URGENT_S where it is in a higher lane than the others' jobs that wait, and AGED_S where it is in a
  lower one: the others get no further jobs then, and it begins when they have ended. A model keeps its turn for at least as long as it took to load.

Whether models fit beside each other is learned from the server (`Residency`). Where nothing is known yet, the first job of one more model tries it, and the other
models get no jobs until the server shows the new one: in a moment where there is memory for both.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from workers.queue_selector import AGED_S
from workers.residency import Models, Residency

URGENT_S = 1.0
"""For so long, a job of a higher lane is left to a worker that has its model loaded."""
NONE: Models = frozenset()


@dataclass(frozen=True, slots=True)
class _ModelLoad:
    """A model that the server is loading for one of our jobs."""

    since: float
    before: Models
    """What was loaded before."""


class ModelTurns:
    """The decisions, for one server."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._residency = Residency()
        self._swappable: Models = NONE
        self.free = True
        """No model was seen to give way, and none is being loaded: those that are loaded get jobs at any time, uncounted."""
        self.resident: Models = NONE
        """The models that the server holds, as far as is known."""
        self._reported: Models = NONE
        """Those that the server named last; while it loads a model, `resident` is what that leads to."""
        self._in_hand: dict[str, int] = {}
        """Jobs that run here or were asked for, by model."""
        self._loads: dict[str, _ModelLoad] = {}
        self._load_s: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._trial: str | None = None
        """The model whose load shows whether it fits beside the others."""
        self._next: str | None = None
        """The model whose turn comes when those that give way have ended."""
        self._giving_way: Models = NONE
        self.loads_begun = 0

    @property
    def loading(self) -> Collection[str]:
        """The models that the server loads for jobs of this worker."""
        return self._loads.keys()

    @property
    def needed(self) -> bool:
        """Whether the server loads and unloads more than one model."""
        return len(self._swappable) > 1

    def serve(self, swappable: Models, resident: Models | None) -> None:
        """Decide about these models. `resident`: those that the server holds; None: nothing new is known."""
        self._swappable = swappable
        if not self.needed:
            self._loads.clear()
        self._in_hand = {model: count for model, count in self._in_hand.items() if model in swappable}
        if self._next is not None and self._next not in swappable:
            self.withdraw(self._next)
        if resident is not None and not self._loads:
            self.resident = self._reported = resident
            self._residency.seen_together(resident)
        self._judge()

    # Questions

    def admits(self, model: str, wanted: Collection[str]) -> bool:
        """Return whether a job of the model may be taken now. `wanted`: the models of which jobs wait."""
        if model not in self._swappable:
            return True
        hand = self._loads.keys() | self._in_hand.keys()
        if self._next is not None:
            if model == self._next:
                return not hand & self._giving_way
            stays = hand - self._giving_way | {self._next, model}
            return model not in self._giving_way and self._fits(stays) is not False
        if self._trial is not None:
            return model == self._trial
        if model in hand:
            return self._fits(hand) is not False
        if model in self.resident:
            return self._fits(hand | {model}) is not False
        fits = self._fits(hand | {model} | self.resident.intersection(wanted))
        return not self._loads if fits is None else fits

    def may_claim(self, model: str, wanted: Collection[str], now: float) -> bool:
        """Return whether the others may give way to a model now, if it has waited long enough."""
        if self._next is not None or self._loads:
            return False
        rivals = self._rivals(model, wanted)
        return all(now - self._began.get(rival, 0.0) >= self._load_s.get(rival, 0.0) for rival in rivals)

    def patience_s(self, standing: int) -> float:
        """Return how long a job waits before the others give way. `standing`: below 0 in a higher lane than theirs, above 0 in a lower one."""
        if standing < 0:
            return min(URGENT_S, self._patience_s)
        return max(AGED_S, self._patience_s) if standing > 0 else self._patience_s

    def is_cold(self, model: str) -> bool:
        """Return whether a job of the model makes the server load it."""
        return model in self._swappable and model not in self.resident

    # Events

    def ask(self, model: str, count: int = 1) -> None:
        """Jobs of the model were asked for, and count as in hand."""
        if not self.free and model in self._swappable:
            self._in_hand[model] = self._in_hand.get(model, 0) + count

    def leave(self, model: str, count: int = 1) -> None:
        """Jobs of the model have ended, or were asked for in vain."""
        left = self._in_hand.get(model, 0) - count
        if left > 0:
            self._in_hand[model] = left
        else:
            self._in_hand.pop(model, None)  # what was asked for before the model was known is not counted

    def empty_hands(self) -> None:
        """No job runs, and none was asked for."""
        self._in_hand.clear()

    def begin(self, model: str, now: float) -> None:
        """A job of the model begins."""
        if model == self._next:
            self._next, self._giving_way = None, NONE
        if model in self.resident or model not in self._swappable:
            return
        self._loads[model] = _ModelLoad(now, self.resident)
        self.loads_begun += 1
        if self._fits(self.resident.union(self._in_hand, (model,))) is None:
            self._trial = model
        self._judge()
        self.resident = frozenset(one for one in self.resident if self._fits(frozenset((one, model))) is not False)
        self.resident |= {model}

    def claim(self, model: str, wanted: Collection[str]) -> None:
        """The others give way to the model; as few of them as need to."""
        self._next = model
        keep, giving_way = frozenset((model,)), NONE
        rivals = self._rivals(model, wanted)
        for rival in sorted(rivals, key=lambda one: self._began.get(one, 0.0), reverse=True):
            if self._fits(keep | {rival}) is False:
                giving_way |= {rival}
            else:
                keep |= {rival}
        self._giving_way = giving_way

    def withdraw(self, model: str) -> None:
        """No job of the model is to be taken for now: the others need not give way."""
        if model == self._next:
            self._next, self._giving_way = None, NONE

    @property
    def next(self) -> str | None:
        """The model that the others give way to."""
        return self._next

    def saw(self, resident: Models | None, loaded: Collection[str], now: float) -> bool:
        """Learn from what the server holds now, where it says so; `loaded`: models whose load has ended. Return whether anything has changed."""
        if resident is None:
            return self._end_loads(loaded)
        changed, self._reported = resident != self._reported, resident
        for model, load in list(self._loads.items()):
            there = model in resident
            if there and load.before <= resident:
                self._residency.seen_together(resident)
                self._end_trial(model)
            if model not in loaded:
                continue
            changed = True
            del self._loads[model]
            self._end_trial(model)
            if there:
                self._load_s[model], self._began[model] = now - load.since, now
                if not load.before <= resident:
                    self._residency.seen_apart(load.before | {model})
                    self._residency.seen_together(resident)
        if not self._loads:
            self.resident = resident
        self._judge()
        return changed

    # The rest

    def _fits(self, models: AbstractSet[str]) -> bool | None:
        return self._residency.fits(frozenset(models))

    def _rivals(self, model: str, wanted: Collection[str]) -> Models:
        return (self.resident.intersection(wanted) | self._in_hand.keys() | self._loads.keys()) - {model}

    def _end_loads(self, models: Collection[str]) -> bool:
        """Forget these loads, of which nothing can be learned. Return whether there was one."""
        ended = self._loads.keys() & set(models)
        for model in ended:
            del self._loads[model]
            self._end_trial(model)
        self._judge()
        return bool(ended)

    def _end_trial(self, model: str) -> None:
        if self._trial == model:
            self._trial = None

    def _judge(self) -> None:
        limited = self._residency.knows_limit and self._fits(self._swappable) is not True
        self.free = not limited and not self._loads
        if self.free:
            self._in_hand.clear()
            self._trial, self._next, self._giving_way = None, None, NONE
