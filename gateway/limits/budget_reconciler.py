"""Compare what gateways reported of budgets with the usage ledger, which is the truth."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import structlog

from backbone.store.budgets import BudgetStore, RememberedSpend
from gateway.limits.budget_meter import NOTHING, Amounts
from gateway.limits.budget_share import BudgetShare
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

MARGIN_S = 60.0
"""Time in which an event reaches the ledger, if nothing is away."""
MERGE_S = 3600.0
"""Age of the ledger's sum from which on reports are added to it without the ledger, as it is away."""
FIRST_READ_S = 2.0
"""Longest wait of a request for the ledger, when the store does not know a budget."""


class SpendSource(Protocol):
    """Says what was spent, by the ledger."""

    async def read(self, holder: str, ids: Iterable[str], start: int, end: int) -> Mapping[str, Amounts]:
        """Return what the keys or teams have used between two times (Unix seconds). Raises Unavailable."""

    async def is_complete(self, before: int) -> bool:
        """Return whether no event from before a time (Unix seconds) waits for the ledger. Raises Unavailable."""


class BudgetReconciler:
    """Reads the ledger for budgets. Without a ledger, reports are added up alone."""

    def __init__(self, store: BudgetStore, source: SpendSource | None, clock: Callable[[], float]) -> None:
        """`source`: None without a ledger. `clock`: Unix seconds."""
        self._store = store
        self._source = source
        self._clock = clock

    async def spent_before(self, budget: BudgetShare, own: float) -> RememberedSpend:
        """Return what was spent of a budget that the store does not know. `own`: what is about to be reported."""
        start, now = budget.window.start, int(self._clock())
        if self._source is not None:
            assigned = budget.assigned
            try:
                async with asyncio.timeout(FIRST_READ_S):
                    end = min(now + 1, budget.window.end)
                    found = await self._source.read(assigned.holder, (assigned.holder_id,), start, end)
                spent = found.get(assigned.holder_id, NOTHING)[budget.index]
                return RememberedSpend(max(0.0, spent - own), now // 60)
            except (Unavailable, TimeoutError) as error:
                log.warning("budgets.spend_unknown", budget=assigned.name, error=str(error) or "no answer in time")
        return RememberedSpend(0.0, start // 60)

    async def reconcile(self, budgets: Iterable[BudgetShare]) -> bool:
        """Replace what gateways reported by the ledger's sums. False: the ledger is away."""
        cut = int(self._clock() - MARGIN_S) // 60
        groups: dict[tuple[str, int], list[BudgetShare]] = {}
        for budget in budgets:
            groups.setdefault((budget.assigned.holder, budget.window.start), []).append(budget)
        try:
            complete = self._source is not None and await self._source.is_complete(60 * cut)
            for (holder, start), group in groups.items():
                if self._source is None:
                    await self._settle(group, cut, {}, complete=False)
                else:
                    ids = {one.assigned.holder_id for one in group}
                    spent = await self._source.read(holder, ids, start, max(start, 60 * cut))
                    await self._settle(group, cut, spent, complete=complete)
        except Unavailable as error:
            log.info("budgets.not_reconciled", error=str(error))
            old = [one for group in groups.values() for one in group if 60 * (cut - one.cut) > MERGE_S]
            with contextlib.suppress(Unavailable):
                await self._settle(old, cut, {}, complete=False)
            return False
        return True

    async def _settle(
        self, budgets: Iterable[BudgetShare], cut: int, spent: Mapping[str, Amounts], *, complete: bool
    ) -> None:
        for budget in budgets:
            amount = spent.get(budget.assigned.holder_id, NOTHING)[budget.index]
            await self._store.settle(budget.key, cut, amount, complete=complete)
            budget.cut = max(budget.cut, cut)
