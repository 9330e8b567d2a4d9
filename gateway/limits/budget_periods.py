"""Calendar periods of budgets, in UTC. They renew exactly at midnight, on Monday and on the first of a month."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from schemas.budgets import BudgetPeriod


class Window(NamedTuple):
    """One calendar period, in Unix seconds."""

    start: int
    """Inclusive."""
    end: int
    """Exclusive: the time at which the budget renews."""


def window_at(period: BudgetPeriod, at: float) -> Window:
    """Return the period that holds the time `at`, in Unix seconds."""
    day = datetime.fromtimestamp(at, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period is BudgetPeriod.DAY:
        return _window(day, day + timedelta(days=1))
    if period is BudgetPeriod.WEEK:
        monday = day - timedelta(days=day.weekday())
        return _window(monday, monday + timedelta(days=7))
    first = day.replace(day=1)
    return _window(first, (first + timedelta(days=31)).replace(day=1))


def _window(start: datetime, end: datetime) -> Window:
    return Window(int(start.timestamp()), int(end.timestamp()))
