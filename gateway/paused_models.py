"""Models whose every live worker waits because its server asked to: nobody takes their jobs before the first is over."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic

from schemas.presence import Pause, RegistrySnapshot, WorkerState


class PausedModels:
    """An index over one snapshot after another. Pauses are durations, counted from when this gateway first saw them."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, Pause], float] = {}
        self._resumes: Mapping[str, float] = {}

    def load(self, snapshot: RegistrySnapshot) -> None:
        """Replace everything by what `snapshot` says."""
        now = monotonic()
        ready = [worker for worker in snapshot.workers.values() if worker.state is WorkerState.READY]
        if not self._resumes and not any(worker.pauses for worker in ready):
            self._seen = {}
            return
        self._seen = {
            (worker.id, pause): self._seen.get((worker.id, pause), now + pause.seconds)
            for worker in ready
            for pause in worker.pauses
        }
        resumes: dict[str, float] = {}
        for worker in ready:
            paused = {pause.model: self._seen[worker.id, pause] for pause in worker.pauses}
            for offer in worker.models:
                at = paused.get(offer.name, 0.0)
                resumes[offer.name] = min(at, resumes.get(offer.name, at))
        self._resumes = {model: at for model, at in resumes.items() if at > now}

    def resumes_at(self, model: str) -> float | None:
        """Return when the first worker takes jobs of the model again, by `monotonic`; None: one does now."""
        return self._resumes.get(model) if self._resumes else None
