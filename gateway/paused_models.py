"""Track models whose workers are all paused because their servers asked to wait: their jobs wait for the first pause to end."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic

from schemas.presence import Pause, RegistrySnapshot, WorkerState


class PausedModels:
    """Knows when paused models resume. A pause is a duration: it counts from the snapshot that first showed it."""

    def __init__(self) -> None:
        self._resume_times: dict[tuple[str, Pause], float] = {}
        self._resumes: Mapping[str, float] = {}

    def load(self, snapshot: RegistrySnapshot) -> None:
        """Replace the pauses by those of `snapshot`."""
        now = monotonic()
        ready = [worker for worker in snapshot.workers.values() if worker.state is WorkerState.READY]
        if not self._resumes and not any(worker.pauses for worker in ready):
            self._resume_times = {}
            return
        self._resume_times = {
            (worker.id, pause): self._resume_times.get((worker.id, pause), now + pause.seconds)
            for worker in ready
            for pause in worker.pauses
        }
        resumes: dict[str, float] = {}
        for worker in ready:
            paused = {pause.model: self._resume_times[worker.id, pause] for pause in worker.pauses}
            for offer in worker.models:
                at = paused.get(offer.name, 0.0)
                resumes[offer.name] = min(at, resumes.get(offer.name, at))
        self._resumes = {model: at for model, at in resumes.items() if at > now}

    def resumes_at(self, model: str) -> float | None:
        """Return when the first worker resumes the model, by `monotonic`; None if the model is not paused."""
        return self._resumes.get(model) if self._resumes else None
