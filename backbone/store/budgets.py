"""Count what was spent of budgets, and share the rest among gateways: each takes a share ahead of need.

For each budget and period, the store holds:

- `base`: what was spent before the minute `cut`, by the ledger where it was read;
- what gateways reported since, by the minute in which requests finished;
- the share of each gateway, until the gateway has not renewed it for `LEASE_S`;
- the mean estimate of a durable job. The estimates of open jobs are their number times this mean, so that none is ever forgotten.

Guarantees of every implementation:
- A share is granted only from what is neither spent, nor in another share, nor estimated for open jobs.
- A period that the store does not know is begun by a gateway that says what was spent in it; until then nothing is granted.
- Each call ends within about two seconds: it raises Unavailable when the store is away, frozen or slow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

LEASE_S = 15.0
"""Time after which the share of a gateway that does not renew it is free again."""


class BudgetKey(NamedTuple):
    """One period of one budget."""

    name: str
    """Unique for its holder, unit and period."""
    start: int
    """The period's beginning, in Unix seconds."""
    holder: str
    """`key` or `team`: whose open jobs count."""
    holder_id: str


class RememberedSpend(NamedTuple):
    """What a gateway knows of a period that the store may have forgotten."""

    spent: float
    cut: int
    """The minute from which on reports are to be added."""


@dataclass(slots=True)
class BudgetReport:
    """What a gateway reports and asks for."""

    limit: float
    need: float = 0.0
    """Grant at least this, or nothing."""
    wanted: float = 0.0
    retained: float = 0.0
    """What the gateway has of earlier grants and needs to keep, which replaces its share."""
    spent: Mapping[int, float] = field(default_factory=dict)
    """What finished requests have used since the last report, by minute since 1970."""
    jobs: int = 0
    """Durable jobs that were accepted since the last report."""
    jobs_estimate: float = 0.0
    """The sum of their estimates."""
    noticed: int = 0
    """The level (`BudgetStanding.level`) that was announced."""
    warn_at: float | None = None
    """The share of the limit at which the level becomes 1."""
    remembered: RememberedSpend | None = None
    ttl_s: float = 0.0
    """Time for which the period is to be stored."""


class BudgetStanding(NamedTuple):
    """A budget in one period, after a report."""

    granted: float
    spent: float
    leased: float
    """All gateways' shares, the grant included."""
    jobs_reserved: float
    """The estimates of open durable jobs."""
    holders: int
    """Gateways that have a share."""
    cut: int
    level: int
    """1: the warning is to be announced; 2: the end of the budget; 0: nothing is."""


class BudgetStore(Protocol):
    """Holds budgets' spend."""

    async def exchange(self, key: BudgetKey, gateway: str, report: BudgetReport) -> BudgetStanding | None:
        """Count what a gateway reports, and grant it a share. None: the period is unknown, and nothing was counted or granted."""

    async def settle(self, key: BudgetKey, cut: int, spent: float, *, complete: bool) -> None:
        """Replace what was reported for the minutes before `cut` by `spent`, the ledger's sum for them.

        `complete`: no event of these minutes is on its way to the ledger. Otherwise the greater of both holds. A `cut` that
        is not newer changes nothing.
        """
