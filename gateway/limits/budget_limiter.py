"""Keep keys and teams within their budgets over all gateways, without a round trip for a request.

A request reserves its estimate from a share of what is left, which the gateway takes ahead of need (`backbone.store.budgets`), and settles
by its usage event, as the ledger has it. Guarantees:

- A budget is exceeded by no more than what the requests that are open at its end use beyond their estimates.
- What is spent agrees with the ledger: each few minutes the ledger's sum replaces what gateways reported, but for the last minutes.
- Periods begin and end by the clock that all gateways share, to the second; a request counts in the period in which it ends.
- Only a request that finds no share waits for the store, and only until the store has refused.
- While the store is away, each gateway goes on with an equal part of what was left. A store that has forgotten learns what was spent from
  the gateways, or from the ledger. Without both, a budget starts from zero until the ledger is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import structlog

from backbone.ids import new_token
from backbone.store.budgets import LEASE_S, BudgetReport, BudgetStanding, BudgetStore, RememberedSpend
from gateway import clock
from gateway.limits.budget_meter import LEAST, Amounts, BudgetMeter
from gateway.limits.budget_periods import window_at
from gateway.limits.budget_reconciler import BudgetReconciler, SpendSource
from gateway.limits.budget_share import IDLE_S, RECHECK_S, BudgetShare
from gateway.limits.budget_state import BudgetState, describe_amount, describe_budget, describe_time
from gateway.limits.effective import AssignedBudget, EffectiveLimits
from gateway.limits.leases import ShareLeases
from schemas.errors import InsufficientQuota, NexusError, RateLimited, Unavailable
from schemas.jobs import Capability
from schemas.usage import FIELDS

log = structlog.get_logger(__name__)

TICK_S = 0.5
"""Between two reports of what was spent."""
FORGET_S = 120.0
"""Time after its last use at which a budget's state is dropped here."""
KEEP_S = 2 * 86_400.0
"""Time for which the store keeps a period that has ended."""
RECONCILE_S = 300.0
"""Age of the ledger's sum from which on it is read again."""
RECONCILE_RETRY_S = 10.0
UNKNOWN_GATEWAYS = 10
"""Number of gateways that is assumed where the store has never answered."""
MAX_REMEMBERED = 20_000
"""Keys whose budgets are remembered."""

_FINISHED_MS = FIELDS.index("finished_ms")


Announce = Callable[[BudgetState, int], Awaitable[None]]
"""Receives a budget and a level: 1 for its warning, 2 for its end. Raises NexusError to be called again."""


@dataclass(slots=True)
class _BudgetsOfKey:
    limits: EffectiveLimits
    budgets: tuple[BudgetShare, ...]
    start: int
    """The time in which all of them hold."""
    end: int
    tokens_only: bool


class Reservation:
    """What a request has reserved. Exactly one of its methods is to be called, once."""

    __slots__ = ("_amounts", "_found", "_limiter")

    def __init__(self, limiter: BudgetLimiter, found: _BudgetsOfKey, amounts: Amounts) -> None:
        self._limiter = limiter
        self._found = found
        self._amounts = amounts

    def settle(self, values: tuple[Any, ...]) -> None:
        """Replace the estimate by what the request has used. `values`: its usage event."""
        found, amounts = self._found, self._amounts
        used = self._limiter.meter.measure(values, found.tokens_only)
        at = values[_FINISHED_MS] // 1000
        in_time, minute = found.start <= at < found.end, at // 60
        for budget in found.budgets:
            estimate, amount = amounts[budget.index], used[budget.index]
            budget.reserved -= estimate
            if in_time:
                budget.available += estimate - amount
                spends = budget.spends
                spends[minute] = spends.get(minute, 0.0) + amount
            else:
                budget.available += estimate - amount if budget.holds(at) else estimate
                self._limiter.spend(budget.assigned, at, amount)

    def release(self) -> None:
        """Give the estimate back: the request does not run."""
        for budget in self._found.budgets:
            budget.reserved -= self._amounts[budget.index]
            budget.available += self._amounts[budget.index]

    def hand_over(self) -> None:
        """Leave the estimate to the store, which counts the open durable jobs: the job was accepted."""
        for budget in self._found.budgets:
            budget.reserved -= self._amounts[budget.index]
            budget.jobs += 1
            budget.jobs_estimate += self._amounts[budget.index]


class BudgetLimiter:
    """Admits requests within the budgets of their keys and teams; the module's docstring lists the guarantees."""

    def __init__(
        self,
        store: BudgetStore,
        meter: BudgetMeter,
        source: SpendSource | None = None,
        *,
        announce: Announce | None = None,
        count_refused: Callable[[AssignedBudget], None] = lambda _: None,
        clock: Callable[[], float] = clock.now,
    ) -> None:
        """`source`: None without a ledger. `clock`: Unix seconds."""
        self._store = store
        self.meter = meter
        self.reconciler = BudgetReconciler(store, source, clock)
        self._announce = announce
        self._count_refused = count_refused
        self._clock = clock
        self._gateway = new_token()
        self._budgets: dict[str, BudgetShare] = {}
        self._ended: list[BudgetShare] = []
        """Budgets of periods that have ended, until all of it is reported."""
        self._by_limits: dict[int, _BudgetsOfKey] = {}
        self._leases: ShareLeases[BudgetShare] = ShareLeases(self._exchange_or_go_on, self._refusal)
        self._reconcile_at = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start to report, and to compare with the ledger."""
        self._tasks = [
            asyncio.create_task(_repeat(TICK_S, self.tick), name="budgets"),
            asyncio.create_task(_repeat(TICK_S, self.reconcile_stale), name="budgets-ledger"),
        ]

    async def close(self) -> None:
        """Report what was spent, give all shares back, and stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for budget in self._budgets.values():
            budget.used_at = -IDLE_S
            budget.recent = budget.need = budget.reserved = 0.0
        with contextlib.suppress(TimeoutError, NexusError):
            async with asyncio.timeout(1.0):
                everything = [*self._ended, *self._budgets.values()]
                await asyncio.gather(*(self._exchange(budget, 0.0) for budget in everything))

    # Requests

    def try_reserve(
        self, limits: EffectiveLimits, capability: Capability, request: Any, size: int
    ) -> Reservation | None:
        """Reserve a request's estimate from the shares that are here. None: one of them does not suffice."""
        found = self._budgets_of(limits)
        return self._take(found, self.meter.estimate(capability, request, size, found.tokens_only))

    async def reserve(self, limits: EffectiveLimits, capability: Capability, request: Any, size: int) -> Reservation:
        """Reserve a request's estimate. Raises InsufficientQuota, and RateLimited where open requests have reserved the rest."""
        while True:
            found = self._budgets_of(limits)
            amounts = self.meter.estimate(capability, request, size, found.tokens_only)
            reservation = self._take(found, amounts)
            if reservation is not None:
                return reservation
            for budget in found.budgets:
                if budget.available < amounts[budget.index]:
                    await self._leases.fill(budget, amounts[budget.index])

    async def require_some(self, limits: EffectiveLimits) -> None:
        """Raise InsufficientQuota if one of the budgets is used up."""
        if not limits.budgets:
            return
        for budget in self._budgets_of(limits).budgets:
            if budget.available < LEAST[budget.index]:
                await self._leases.fill(budget, LEAST[budget.index])

    def charge(self, limits: EffectiveLimits, values: tuple[Any, ...]) -> None:
        """Count a finished run of a durable job, which any gateway may have accepted. `values`: its usage event."""
        found = self._budgets_of(limits)
        used = self.meter.measure(values, found.tokens_only)
        for budget in found.budgets:
            self.spend(budget.assigned, values[_FINISHED_MS] // 1000, used[budget.index])

    def spend(self, assigned: AssignedBudget, at: int, amount: float) -> None:
        """Count what was spent of a budget at a time, in the period that holds it."""
        budget = self._current(assigned)
        if not budget.holds(at):
            window = window_at(assigned.budget.period, at)
            ended = (one for one in self._ended if one.assigned.name == assigned.name and one.window == window)
            budget = next(ended, None) or BudgetShare(assigned, window, budget.holders)
            if budget not in self._ended:
                self._ended.append(budget)
        budget.spend(at // 60, amount)

    async def state(self, assigned: AssignedBudget) -> BudgetState:
        """Return what is spent and reserved of a budget. Raises Unavailable."""
        budget, began_at = self._current(assigned), monotonic()
        while budget.exchanged_at < began_at:
            if budget.lease is not None:
                await asyncio.shield(budget.lease)
                continue
            await asyncio.shield(self._leases.begin(budget, 0.0))
            if budget.exchanged_at < began_at:
                raise Unavailable("Redis, which counts budgets, does not answer. Retry shortly.")
        return BudgetState(assigned, budget.window, budget.spent, budget.leased)

    def _take(self, found: _BudgetsOfKey, amounts: Amounts) -> Reservation | None:
        budgets = found.budgets
        for budget in budgets:
            if budget.available < amounts[budget.index]:
                return None
        now = monotonic()
        for budget in budgets:
            amount = amounts[budget.index]
            budget.available -= amount
            budget.reserved += amount
            budget.used += amount
            budget.need, budget.used_at = amount, now
            if budget.available < budget.recent / 2 and budget.lease is None and now >= budget.check_at:
                self._leases.begin(budget, 0.0)
        return Reservation(self, found, amounts)

    def _budgets_of(self, limits: EffectiveLimits) -> _BudgetsOfKey:
        """Return the budgets of a key in their present periods."""
        found = self._by_limits.get(id(limits))
        if found is None or found.limits is not limits or not found.start <= self._clock() < found.end:
            if len(self._by_limits) >= MAX_REMEMBERED:
                self._by_limits.clear()
            budgets = tuple(self._current(assigned) for assigned in limits.budgets)
            start, end = max(one.window.start for one in budgets), min(one.window.end for one in budgets)
            tokens_only = all(one.index == 0 for one in budgets)
            found = self._by_limits[id(limits)] = _BudgetsOfKey(limits, budgets, start, end, tokens_only)
        return found

    def _current(self, assigned: AssignedBudget) -> BudgetShare:
        """Return a budget in its present period."""
        now, budget = self._clock(), self._budgets.get(assigned.name)
        if budget is None or not budget.holds(now):
            holders = UNKNOWN_GATEWAYS
            if budget is not None:
                holders = budget.holders
                self._ended.append(budget)
            budget = self._budgets[assigned.name] = BudgetShare(
                assigned, window_at(assigned.budget.period, now), holders
            )
        elif budget.assigned is not assigned:
            if budget.assigned.budget.amount != assigned.budget.amount:  # the share is of the old amount
                budget.available = min(0.0, budget.available)
                budget.check_at, budget.noticed = 0.0, 0
            budget.assigned = assigned
        return budget

    # Shares

    async def _exchange_or_go_on(self, budget: BudgetShare, need: float) -> None:
        """Exchange with the store, or grant what may be granted here while it is away."""
        try:
            await self._exchange(budget, need)
        except Unavailable:
            budget.go_on_alone(max(need, budget.wanting))

    async def _exchange(self, budget: BudgetShare, need: float) -> None:
        """Report what was spent, give back what is not needed, or take what is. Raises Unavailable."""
        now = monotonic()
        target = max(need, budget.wanting, budget.target(now))
        has, debt = max(0.0, budget.available), min(0.0, budget.available)
        unused = max(0.0, has - target)
        spends, budget.spends = budget.spends, {}
        jobs, budget.jobs = budget.jobs, 0
        jobs_estimate, budget.jobs_estimate = budget.jobs_estimate, 0.0
        budget.available -= unused
        report = BudgetReport(
            limit=float(budget.assigned.budget.amount),
            need=max(0.0, need - has),
            wanted=max(0.0, target - has),
            retained=has - unused + max(0.0, budget.reserved),
            spent=spends,
            jobs=jobs,
            jobs_estimate=jobs_estimate,
            noticed=budget.noticed,
            warn_at=budget.assigned.budget.warn_at,
            ttl_s=max(0.0, budget.window.end - self._clock()) + KEEP_S,
        )
        if budget.remembered:
            report.remembered = RememberedSpend(budget.spent, int(self._clock()) // 60)
        try:
            standing = await self._store.exchange(budget.key, self._gateway, report)
            if standing is None:
                report.remembered = await self.reconciler.spent_before(budget, sum(spends.values()))
                standing = await self._store.exchange(budget.key, self._gateway, report)
            if standing is None:
                raise Unavailable("Redis forgot a budget while it was counted. Retry shortly.")
        except BaseException:
            for minute, amount in spends.items():
                budget.spend(minute, amount)
            budget.jobs, budget.jobs_estimate = budget.jobs + jobs, budget.jobs_estimate + jobs_estimate
            budget.available += unused
            raise
        budget.available -= debt  # it is spent, and reported
        self._apply(budget, standing, report, now)
        if standing.level:
            await self._notice(budget, standing)

    def _apply(self, budget: BudgetShare, standing: BudgetStanding, report: BudgetReport, now: float) -> None:
        budget.available += standing.granted
        budget.spent, budget.leased = standing.spent, standing.leased + standing.jobs_reserved
        budget.cut, budget.holders, budget.remembered = standing.cut, max(1, standing.holders), True
        budget.exchanged_at, budget.reported_level = monotonic(), report.noticed
        free = report.limit - budget.spent - budget.leased
        budget.alone = max(0.0, free) / budget.holders
        is_short = standing.granted < report.need or standing.spent >= report.limit
        budget.check_at = now + RECHECK_S if is_short else 0.0

    async def _notice(self, budget: BudgetShare, standing: BudgetStanding) -> None:
        """Announce that a budget has reached its warning or its end, once in a period."""
        if self._announce is not None:
            try:
                state = BudgetState(budget.assigned, budget.window, budget.spent, budget.leased)
                await self._announce(state, standing.level)
            except NexusError as error:
                log.warning("budgets.not_announced", budget=budget.assigned.name, error=str(error))
                return
        log.info(
            "budgets.reached",
            budget=budget.assigned.name,
            spent=standing.spent,
            amount=budget.assigned.budget.amount,
            is_used_up=standing.level == 2,
        )
        budget.noticed = standing.level

    def _refusal(self, budget: BudgetShare, need: float) -> NexusError:
        self._count_refused(budget.assigned)
        assigned, currency, left = budget.assigned, self.meter.currency(), budget.assigned.budget.amount - budget.spent
        name = describe_budget(assigned, currency)
        if 0 < need <= left:
            return RateLimited(
                f"What is left of {name} is reserved for open requests and jobs. Retry when some of them have ended.",
                retry_after_s=5.0,
            )
        wait = f"wait until it renews at {describe_time(budget.window.end)}, or ask the operator of this gateway to raise it"
        if left <= 0:
            return InsufficientQuota(f"You exceeded your current quota: {name} is used up. You can {wait}.")
        rest, use = (describe_amount(amount, assigned.budget.unit, currency) for amount in (left, need))
        return InsufficientQuota(
            f"You exceeded your current quota: {rest} are left of {name}, and this request may use {use}. You can send a smaller "
            f"one, such as with a lower 'max_tokens', {wait}."
        )

    async def tick(self) -> None:
        """Report what was spent, keep shares, and take the next ones."""
        now = monotonic()
        due: list[asyncio.Task[None]] = []
        for budget in list(self._budgets.values()):
            budget.recent = (budget.recent + 2 * budget.used) / 2 if budget.used or budget.recent > 1e-9 else 0.0
            budget.used = 0.0
            if budget.lease is None and self._is_due(budget, now):
                due.append(self._leases.begin(budget, 0.0))
        for budget in self._ended:
            if budget.lease is None and (budget.spends or budget.jobs):
                budget.used_at, budget.recent = now - IDLE_S, 0.0
                due.append(self._leases.begin(budget, 0.0))
        await asyncio.gather(*due)
        self._ended = [one for one in self._ended if one.spends or one.jobs or one.reserved > 1e-9]
        self._forget(now)

    def _is_due(self, budget: BudgetShare, now: float) -> bool:
        if budget.spends or budget.jobs or budget.noticed != budget.reported_level:
            return True
        share = budget.available + budget.reserved
        age = now - budget.exchanged_at
        if share > 0 and age >= LEASE_S / 3:
            return True
        if budget.available > budget.target(now):
            return True
        return budget.available < budget.recent and now >= budget.check_at

    def _forget(self, now: float) -> None:
        for name, budget in list(self._budgets.items()):
            is_idle = not (budget.spends or budget.jobs or budget.available > 1e-9 or budget.reserved > 1e-9)
            if is_idle and now - budget.used_at > FORGET_S:
                del self._budgets[name]
                self._by_limits.clear()

    async def reconcile_stale(self) -> None:
        """Replace what gateways reported by the ledger's sums, where these are old."""
        now = self._clock()
        if monotonic() < self._reconcile_at:
            return
        stale = [one for one in self._budgets.values() if one.remembered and now - 60 * one.cut > RECONCILE_S]
        if stale and not await self.reconciler.reconcile(stale):
            self._reconcile_at = monotonic() + RECONCILE_RETRY_S


async def _repeat(interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(interval_s)
        try:
            await work()
        except Exception:
            log.exception("budgets.tick_crashed")
