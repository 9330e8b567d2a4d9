"""One period of a budget, as one gateway knows it: its share, and what it has to report."""

from __future__ import annotations

import asyncio
from time import monotonic

from backbone.store.budgets import BudgetKey
from gateway.limits.budget_periods import Window
from gateway.limits.effective import AssignedBudget
from schemas.budgets import BudgetUnit

IDLE_S = 10.0
"""Time after its last use at which a share is given back."""
SPARE_REQUESTS = 10
"""Requests that must still fit in a gateway's part of the rest, for a gateway to keep a share of one ahead of need."""
RECHECK_S = 1.0
"""Time after which a refused gateway asks again."""

_INDEX = {BudgetUnit.TOKENS: 0, BudgetUnit.SLOT_SECONDS: 1, BudgetUnit.COST: 2}


class BudgetShare:
    """One period of a budget, as this gateway knows it."""

    __slots__ = (
        "alone", "assigned", "available", "check_at", "cut", "exchanged_at", "holders", "index", "jobs", "jobs_estimate", "lease", "leased",
        "need", "noticed", "recent", "remembered", "reported_level", "reserved", "spends", "spent", "used", "used_at", "wanting", "window",
    )  # fmt: skip

    def __init__(self, assigned: AssignedBudget, window: Window, holders: int) -> None:
        self.assigned = assigned
        self.window = window
        self.index = _INDEX[assigned.budget.unit]
        self.available = self.reserved = 0.0
        """What is left of the share, and what open requests have reserved of it. `available` is negative if they used more."""
        self.spends: dict[int, float] = {}
        """What was spent and is not reported, by minute."""
        self.jobs, self.jobs_estimate = 0, 0.0
        self.spent = self.leased = 0.0
        """By the last answer of the store."""
        self.remembered = False
        """Whether the store has answered."""
        self.cut = 0
        self.noticed = self.reported_level = 0
        """The level that was announced, and that which the store knows to be."""
        self.holders = holders
        self.alone = assigned.budget.amount / holders
        """What may be granted here while the store is away."""
        self.used = self.recent = self.need = 0.0
        """What was reserved since the last tick, that in half a second on average, and by the last request."""
        self.wanting = 0.0
        self.check_at = 0.0
        self.used_at = self.exchanged_at = monotonic()
        self.lease: asyncio.Task[None] | None = None

    @property
    def key(self) -> BudgetKey:
        """Return the name of the period in the store."""
        return BudgetKey(self.assigned.name, self.window.start, self.assigned.holder, self.assigned.holder_id)

    def target(self, now: float) -> float:
        """Return the share to keep: for the next second, or one request; near the end no more than is in use."""
        is_idle = now - self.used_at >= IDLE_S or self.alone < SPARE_REQUESTS * self.need
        return self.recent if is_idle else max(self.recent, self.need)

    def spend(self, minute: int, amount: float) -> None:
        """Count what was spent in a minute."""
        if amount:
            self.spends[minute] = self.spends.get(minute, 0.0) + amount

    def holds(self, at: float) -> bool:
        """Return whether the period holds a time."""
        return self.window.start <= at < self.window.end

    def go_on_alone(self, need: float) -> None:
        """Grant a part of what was left, as the store is away."""
        granted = min(self.alone, max(need - self.available, self.recent))
        self.alone -= granted
        self.available += granted
        self.check_at = monotonic() + RECHECK_S if self.available < need else 0.0
