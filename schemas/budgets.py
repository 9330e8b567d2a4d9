"""Define budgets: how much a team or a key may use in a calendar period, in UTC."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class BudgetUnit(StrEnum):
    """What a budget counts."""

    TOKENS = "tokens"
    """Tokens of prompts and answers."""
    SLOT_SECONDS = "slot_seconds"
    """Seconds for which requests took a slot of a worker."""
    COST = "cost"
    """Money, by the operator's price list and in its currency."""

    __hash__ = str.__hash__


class BudgetPeriod(StrEnum):
    """The calendar period after which a budget renews, in UTC."""

    DAY = "day"
    WEEK = "week"
    """From Monday on, as in ISO 8601."""
    MONTH = "month"

    __hash__ = str.__hash__


class Budget(BaseModel):
    """One budget of a team or a key."""

    model_config = ConfigDict(frozen=True)

    unit: BudgetUnit
    amount: int | float
    """Tokens, seconds, or units of the price list's currency."""
    period: BudgetPeriod
    warn_at: float | None = None
    """The share of the amount at which a warning is sent; None: no warning."""
