"""The worker's presence in the registry: what it announces, and when that must be updated."""

from __future__ import annotations

import os

from backbone.registry.registry import Announcement, Registry
from backbone.version import VERSION
from schemas.presence import BackendLoad, Limitation, ModelOffer, Pause, WorkerPresence, WorkerState
from workers.backends.base import Backend
from workers.model_pauses import ModelPauses

PRESENCE_INTERVAL_S = 5.0
"""The shortest interval of updates of the worker's load in the registry: every gateway receives each of them."""
PAUSES_INTERVAL_S = 1.0
"""The shortest interval of updates of the paused models in the registry."""
MAX_LISTED = 100
"""The most limitations, pauses, and problems in the registry, of each."""
MAX_PROBLEM_LENGTH = 1000
"""Characters of a problem in the registry."""


class PresenceReporter:
    """Announces one worker, and knows whether its announcement is outdated."""

    def __init__(self, registry: Registry, backend: Backend, pauses: ModelPauses, *, worker: str, host: str) -> None:
        self._registry = registry
        self._backend = backend
        self._pauses = pauses
        self._worker = worker
        self._host = host
        self._announcement: Announcement | None = None
        self.announced_problems: tuple[str, ...] = ()
        self._announced_busy = 0
        self._limitations: tuple[Limitation, ...] = ()
        self._load_figures: BackendLoad | None = None
        self._announced_pauses: tuple[Pause, ...] = ()
        self._announced_descriptors = b""
        self._next_update = 0.0
        self._next_pauses_update = 0.0

    @property
    def is_announced(self) -> bool:
        """Whether the worker has been announced."""
        return self._announcement is not None

    async def announce(
        self,
        state: WorkerState,
        *,
        slots: int,
        busy: int,
        models: tuple[ModelOffer, ...],
        problems: tuple[str, ...],
        descriptors: bytes,
    ) -> None:
        """Announce the worker, or update its announcement."""
        self._load_figures = self._backend.load_figures()
        presence = WorkerPresence(
            id=self._worker,
            backend=self._backend.name,
            host=self._host,
            pid=os.getpid(),
            version=VERSION,
            slots=slots,
            busy=busy,
            load=self._load_figures,
            models=models,
            state=state,
            limitations=self._limitations,
            pauses=self._announced_pauses,
            problems=problems,
        )
        self.announced_problems = problems
        if self._announcement is None:
            self._announcement = await self._registry.announce(presence)
        else:
            await self._announcement.update(presence)
        if descriptors != self._announced_descriptors:
            self._announced_descriptors = descriptors
            await self._announcement.describe(descriptors)

    def take_update(self, now: float, busy: int) -> bool:
        """Return whether to announce the worker again now, and note the limitations and pauses to announce."""
        limitations, pauses = self._backend.limitations()[:MAX_LISTED], self._pauses.active_pauses()[:MAX_LISTED]
        changed = now >= self._next_update and (
            busy != self._announced_busy
            or limitations != self._limitations
            or self._backend.load_figures() != self._load_figures
        )
        changed = changed or (now >= self._next_pauses_update and pauses != self._announced_pauses)
        if not changed or self._announcement is None:
            return False
        self._announced_busy = busy
        self._next_update, self._next_pauses_update = now + PRESENCE_INTERVAL_S, now + PAUSES_INTERVAL_S
        self._limitations, self._announced_pauses = limitations, pauses
        return True

    async def withdraw(self) -> None:
        """Withdraw the announcement."""
        if self._announcement is not None:
            await self._announcement.withdraw()


def truncate_problems(problems: tuple[str, ...]) -> tuple[str, ...]:
    """Return as much of the problems as the registry may hold."""
    return tuple(problem[:MAX_PROBLEM_LENGTH] for problem in problems[:MAX_LISTED])
