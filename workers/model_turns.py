"""Turns of the models on a server that cannot hold all of its models at once. Pure: no clock, no bus.

A model's jobs are served as long as more of them wait. A model that does not fit beside those in use gets its turn

- when no model in use, and no loaded model with waiting jobs, is left;
- when its oldest job has waited for `patience_s`; HIGHER_LANE_PATIENCE_S where that job is in a higher lane than the other waiting
  jobs, and AGING_S where it is in a lower one: the other models get no further jobs then, and the model starts when their jobs have
  ended. A model keeps its turn for at least as long as its load took.

Whether models fit beside each other is learned from the server (`Residency`). Where that is unknown, the first job of one more model
is a trial, and the other models get no jobs until the server shows the new model: that takes a moment where memory suffices for both.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from workers.queue_selector import AGING_S
from workers.residency import ModelSet, Residency

HIGHER_LANE_PATIENCE_S = 1.0
"""For so long, a job of a higher lane is left to a worker that has its model loaded."""
NO_MODELS: ModelSet = frozenset()


@dataclass(frozen=True, slots=True)
class _ModelLoad:
    """A model that the server is loading for a job of this worker."""

    since: float
    resident_before: ModelSet
    """The models that were in memory before."""


class ModelTurns:
    """Decides which models of one server get jobs."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._residency = Residency()
        self._swappable: ModelSet = NO_MODELS
        self.unrestricted = True
        """No model had to be unloaded for another one, and none is being loaded: loaded models get jobs at any time, uncounted."""
        self.resident_models: ModelSet = NO_MODELS
        """The models that the server holds, as far as is known."""
        self._reported: ModelSet = NO_MODELS
        """The models that the server named last; while it loads a model, `resident_models` is the expected result."""
        self._active_jobs: dict[str, int] = {}
        """Jobs that run on this worker or were requested, by model."""
        self._loads: dict[str, _ModelLoad] = {}
        self._load_s: dict[str, float] = {}
        self._turn_began: dict[str, float] = {}
        self._trial: str | None = None
        """The model whose load shows whether it fits beside the others."""
        self._claimant: str | None = None
        """The model whose turn comes when the jobs of the yielding models have ended."""
        self._yielding: ModelSet = NO_MODELS
        self.load_count = 0

    @property
    def loading_models(self) -> Collection[str]:
        """The models that the server loads for jobs of this worker."""
        return self._loads.keys()

    @property
    def is_needed(self) -> bool:
        """Whether the server loads and unloads more than one model."""
        return len(self._swappable) > 1

    def update_models(self, swappable: ModelSet, resident: ModelSet | None) -> None:
        """Set the models to decide about. `resident`: the models in memory; None where nothing new is known."""
        self._swappable = swappable
        if not self.is_needed:
            self._loads.clear()
        self._active_jobs = {model: count for model, count in self._active_jobs.items() if model in swappable}
        if self._claimant is not None and self._claimant not in swappable:
            self.cancel_claim(self._claimant)
        if resident is not None and not self._loads:
            self.resident_models = self._reported = resident
            self._residency.record_fitting(resident)
        self._update_restriction()

    # Decisions

    def admits(self, model: str, waiting: Collection[str]) -> bool:
        """Return whether a job of the model may be taken now. `waiting`: the models of which jobs wait."""
        if model not in self._swappable:
            return True
        active = self._loads.keys() | self._active_jobs.keys()
        if self._claimant is not None:
            if model == self._claimant:
                return not active & self._yielding
            staying = active - self._yielding | {self._claimant, model}
            return model not in self._yielding and self._fits(staying) is not False
        if self._trial is not None:
            return model == self._trial
        if model in active:
            return self._fits(active) is not False
        if model in self.resident_models:
            return self._fits(active | {model}) is not False
        fits = self._fits(active | {model} | self.resident_models.intersection(waiting))
        return not self._loads if fits is None else fits

    def may_claim(self, model: str, waiting: Collection[str], now: float) -> bool:
        """Return whether the other models may yield to this one now, if it has waited long enough."""
        if self._claimant is not None or self._loads:
            return False
        rivals = self._rivals(model, waiting)
        return all(now - self._turn_began.get(rival, 0.0) >= self._load_s.get(rival, 0.0) for rival in rivals)

    def patience_s(self, lane_difference: int) -> float:
        """Return how long a job waits before the other models yield.

        `lane_difference`: below 0 in a higher lane than the other models' jobs, above 0 in a lower one.
        """
        if lane_difference < 0:
            return min(HIGHER_LANE_PATIENCE_S, self._patience_s)
        return max(AGING_S, self._patience_s) if lane_difference > 0 else self._patience_s

    def needs_load(self, model: str) -> bool:
        """Return whether a job of the model makes the server load it."""
        return model in self._swappable and model not in self.resident_models

    # Events

    def record_request(self, model: str, count: int = 1) -> None:
        """Count jobs of the model that were requested."""
        if not self.unrestricted and model in self._swappable:
            self._active_jobs[model] = self._active_jobs.get(model, 0) + count

    def record_end(self, model: str, count: int = 1) -> None:
        """Discount jobs of the model that have ended, or did not come."""
        left = self._active_jobs.get(model, 0) - count
        if left > 0:
            self._active_jobs[model] = left
        else:
            self._active_jobs.pop(model, None)  # jobs requested before the model was known were not counted

    def reset_active_jobs(self) -> None:
        """Note that no job runs, and none was requested."""
        self._active_jobs.clear()

    def start_job(self, model: str, now: float) -> None:
        """Note that a job of the model starts, which may begin its load."""
        if model == self._claimant:
            self._claimant, self._yielding = None, NO_MODELS
        if model in self.resident_models or model not in self._swappable:
            return
        self._loads[model] = _ModelLoad(now, self.resident_models)
        self.load_count += 1
        if self._fits(self.resident_models.union(self._active_jobs, (model,))) is None:
            self._trial = model
        self._update_restriction()
        self.resident_models = frozenset(
            one for one in self.resident_models if self._fits(frozenset((one, model))) is not False
        )
        self.resident_models |= {model}

    def claim(self, model: str, waiting: Collection[str]) -> None:
        """Let the other models yield to this one; as few of them as necessary."""
        self._claimant = model
        keep, yielding = frozenset((model,)), NO_MODELS
        rivals = self._rivals(model, waiting)
        for rival in sorted(rivals, key=lambda one: self._turn_began.get(one, 0.0), reverse=True):
            if self._fits(keep | {rival}) is False:
                yielding |= {rival}
            else:
                keep |= {rival}
        self._yielding = yielding

    def cancel_claim(self, model: str) -> None:
        """Let the other models go on, where they yield to this one: no job of it will be taken for now."""
        if model == self._claimant:
            self._claimant, self._yielding = None, NO_MODELS

    @property
    def claimant(self) -> str | None:
        """The model to which the others yield."""
        return self._claimant

    def update_residency(self, resident: ModelSet | None, loaded: Collection[str], now: float) -> bool:
        """Learn from the models in memory now (None where the server does not say); return whether anything has changed.

        `loaded`: models whose load has ended.
        """
        if resident is None:
            return self._end_loads(loaded)
        changed, self._reported = resident != self._reported, resident
        for model, load in list(self._loads.items()):
            is_resident = model in resident
            if is_resident and load.resident_before <= resident:
                self._residency.record_fitting(resident)
                self._end_trial(model)
            if model not in loaded:
                continue
            changed = True
            del self._loads[model]
            self._end_trial(model)
            if is_resident:
                self._load_s[model], self._turn_began[model] = now - load.since, now
                if not load.resident_before <= resident:
                    self._residency.record_conflict(load.resident_before | {model})
                    self._residency.record_fitting(resident)
        if not self._loads:
            self.resident_models = resident
        self._update_restriction()
        return changed

    # Private parts

    def _fits(self, models: AbstractSet[str]) -> bool | None:
        return self._residency.fits(frozenset(models))

    def _rivals(self, model: str, waiting: Collection[str]) -> ModelSet:
        active = self.resident_models.intersection(waiting) | self._active_jobs.keys() | self._loads.keys()
        return active - {model}

    def _end_loads(self, models: Collection[str]) -> bool:
        """End these loads without an observation; return whether there was one."""
        ended = self._loads.keys() & set(models)
        for model in ended:
            del self._loads[model]
            self._end_trial(model)
        self._update_restriction()
        return bool(ended)

    def _end_trial(self, model: str) -> None:
        if self._trial == model:
            self._trial = None

    def _update_restriction(self) -> None:
        limited = self._residency.has_limit and self._fits(self._swappable) is not True
        self.unrestricted = not limited and not self._loads
        if self.unrestricted:
            self._active_jobs.clear()
            self._trial, self._claimant, self._yielding = None, None, NO_MODELS
