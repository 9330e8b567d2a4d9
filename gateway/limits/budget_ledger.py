"""Read from the usage ledger what was spent of budgets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

from backbone.ledger.usage_ledger import UsageLedger
from backbone.ledger.usage_query import UsageQuery, UsageSum
from gateway.limits.budget_meter import NOTHING, Amounts

MAX_IDS = 500
"""Keys or teams that one query adds up."""
MAX_CURRENCIES = 10
NANO = 1_000_000_000


class LedgerSpend:
    """The ledger as a source of what was spent; see `gateway.limits.budget_limiter.SpendSource`."""

    def __init__(
        self, ledger: UsageLedger, oldest: Callable[[], Awaitable[int | None]], currency: Callable[[], str]
    ) -> None:
        """`oldest` returns when the oldest event that waits for the ledger was stored (Unix seconds); None: none waits.

        Costs in other currencies than `currency()` are not counted: the price list's was changed since.
        """
        self._ledger = ledger
        self._oldest = oldest
        self._currency = currency

    async def read(self, holder: str, ids: Iterable[str], start: int, end: int) -> Mapping[str, Amounts]:
        """Return what keys or teams have used. Those that are missing have used nothing."""
        found: dict[str, Amounts] = {}
        wanted = list(ids) if start < end else []
        for first in range(0, len(wanted), MAX_IDS):
            chosen = tuple(wanted[first : first + MAX_IDS])
            query = UsageQuery(start, end, group_by=(holder,), filters={holder: chosen}, limit=MAX_IDS * MAX_CURRENCIES)
            for row in await self._ledger.add_up(query):
                holder_id = row.group[holder]
                found[holder_id] = _sum(found.get(holder_id, NOTHING), self._amounts(row))
        return found

    async def is_complete(self, before: int) -> bool:
        """Return whether no event that was stored before a time waits."""
        oldest = await self._oldest()
        return oldest is None or oldest >= before

    def _amounts(self, row: UsageSum) -> Amounts:
        cost = row.cost_nanos / NANO if row.currency == self._currency() else 0.0
        return row.sums["input_tokens"] + row.sums["output_tokens"], row.sums["slot_us"] / 1e6, cost


def _sum(one: Amounts, other: Amounts) -> Amounts:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]
