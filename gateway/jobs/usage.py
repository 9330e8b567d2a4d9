"""Make the usage events of durable jobs from their outcomes."""

from __future__ import annotations

from collections.abc import Callable

from backbone.store.store import Store
from gateway.jobs.records import id_created_ms
from gateway.usage.emitter import UsageEmitter
from gateway.usage.events import event_of_outcome
from schemas.outcome import Outcome


class OutcomeUsage:
    """Stores the usage of each run that has an outcome, before the outcome is settled or deleted."""

    def __init__(
        self, emitter: UsageEmitter, store: Store, person_of: Callable[[str], str] = lambda _key_id: ""
    ) -> None:
        """`person_of` returns the id of the person behind a key, or empty."""
        self._emitter = emitter
        self._store = store
        self._person_of = person_of

    async def store(self, outcome: Outcome, stored_at: int) -> None:
        """Store the usage of an outcome. A repetition folds. Raises Unavailable.

        `stored_at`: when the outcome was stored, in Unix seconds.
        """
        accepted_ms, person = await self._accepted_ms(outcome), self._person_of(outcome.key)
        await self._emitter.store(event_of_outcome(outcome, 1000 * stored_at, accepted_ms, person))

    async def _accepted_ms(self, outcome: Outcome) -> int | None:
        if outcome.run == 1:
            return id_created_ms(outcome.job)
        record = await self._store.get(outcome.owner, outcome.job)
        if record is None or record.run != outcome.run or record.queued_at is None:
            return None
        return 1000 * record.queued_at
