"""Observation of a server while it loads a model for a job: which models it holds shows whether they fit in memory together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from time import monotonic

import structlog

from workers.attempt import Attempt
from workers.backends.base import Backend
from workers.model_turns import ModelTurns

log = structlog.get_logger(__name__)

MIN_POLL_INTERVAL_S, MAX_POLL_INTERVAL_S = 0.02, 0.25
"""How often the worker polls which models the server holds: often at first, when that shows whether the new model fits."""
RESPONSE_TIMEOUT_S = 10.0


class LoadMonitor:
    """Follows the loads of models that jobs of this worker cause, and tells the model turns about them."""

    def __init__(
        self,
        backend: Backend,
        turns: ModelTurns,
        *,
        worker: str,
        attempts: Callable[[], Iterable[Attempt]],
        on_models_changed: Callable[[], None],
        on_poll: Callable[[], None],
    ) -> None:
        """Create a monitor. `on_models_changed`: the server holds other models; `on_poll`: more jobs may be admitted now."""
        self.turns = turns
        self._backend = backend
        self._worker = worker
        self._attempts = attempts
        self._on_models_changed = on_models_changed
        self._on_poll = on_poll
        self._load_began = asyncio.Event()
        self._completed: set[str] = set()
        """Models of which a job has been completed since their load began."""

    def record_start(self) -> None:
        """Note that a job starts, which may begin a load."""
        if self.turns.loading_models:
            self._load_began.set()

    def record_completion(self, model: str) -> None:
        """Note that a job of the model has been completed."""
        if self.turns.loading_models:
            self._completed.add(model)

    async def run(self) -> None:
        """Follow loads until cancelled."""
        while True:
            await self._load_began.wait()
            self._load_began.clear()
            self._completed.clear()
            interval_s = MIN_POLL_INTERVAL_S
            while self.turns.loading_models:
                loaded = {model for model in self.turns.loading_models if self._is_loaded(model)}
                if self.turns.update_residency(await self._resident_models(), loaded, monotonic()):
                    self._on_models_changed()
                self._completed -= loaded
                self._on_poll()
                await asyncio.sleep(interval_s)
                interval_s = min(2 * interval_s, MAX_POLL_INTERVAL_S)

    async def _resident_models(self) -> frozenset[str] | None:
        """Return the models that the server holds; None where it does not say now."""
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT_S):
                return await self._backend.resident_models()
        except Exception as error:  # an adapter may raise anything, and the monitor must go on
            log.debug("worker.resident_models_unknown", worker=self._worker, error=str(error))
            return None

    def _is_loaded(self, model: str) -> bool:
        """Return whether a load is over: a job of the model has begun to answer or was completed, or none is left."""
        if model in self._completed:
            return True
        attempts = [attempt for attempt in self._attempts() if attempt.envelope.model == model]
        return not attempts or any(attempt.has_model_loaded for attempt in attempts)
