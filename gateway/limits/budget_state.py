"""Describe budgets for readers: as the API's objects, and in words."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

from gateway.limits.budget_periods import Window
from gateway.limits.effective import AssignedBudget
from schemas.budgets import BudgetUnit

NAMES = {BudgetUnit.TOKENS: "tokens", BudgetUnit.SLOT_SECONDS: "slot-seconds"}
DIGITS = {BudgetUnit.TOKENS: 0, BudgetUnit.SLOT_SECONDS: 6, BudgetUnit.COST: 9}
"""Digits behind the point: what the ledger counts."""


class BudgetState(NamedTuple):
    """A budget in one period. `spent + reserved + left` is the amount, unless more was spent."""

    assigned: AssignedBudget
    window: Window
    spent: float
    reserved: float
    """By estimate, of open requests and jobs, and in the shares of gateways."""

    @property
    def left(self) -> float:
        """Return what is neither spent nor reserved."""
        return max(0.0, self.assigned.budget.amount - self.spent - self.reserved)


def budget_object(state: BudgetState, currency: str) -> dict[str, Any]:
    """Return the API's object for a budget."""
    assigned, budget = state.assigned, state.assigned.budget
    digits = DIGITS[budget.unit]

    def number(amount: float) -> float:
        return round(amount, digits) if digits else round(amount)

    return {
        "object": "budget",
        "holder": assigned.holder,
        "holder_id": assigned.holder_id,
        "unit": budget.unit,
        "currency": currency or None if budget.unit is BudgetUnit.COST else None,
        "period": budget.period,
        "amount": budget.amount,
        "warn_at": budget.warn_at,
        "spent": number(state.spent),
        "reserved": number(state.reserved),
        "left": number(state.left),
        "starts_at": state.window.start,
        "renews_at": state.window.end,
    }


def describe_amount(amount: float, unit: BudgetUnit, currency: str) -> str:
    """Return an amount in words: `1,000 tokens`, `2.5 slot-seconds`, `0.25 usd`."""
    digits = min(DIGITS[unit], 4)
    text = f"{amount:,.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text} {NAMES.get(unit) or currency or 'units of cost'}"


def describe_budget(assigned: AssignedBudget, currency: str) -> str:
    """Return a budget in words: `this team's budget of 1,000 tokens per day`."""
    holder = "API key" if assigned.holder == "key" else "team"
    amount = describe_amount(assigned.budget.amount, assigned.budget.unit, currency)
    return f"this {holder}'s budget of {amount} per {assigned.budget.period}"


def describe_time(at: int) -> str:
    """Return a time, in Unix seconds, by ISO 8601."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
