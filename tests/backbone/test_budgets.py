"""Budgets that several gateways share, on one real Redis and one real ledger: whatever is lost, the sums agree in the end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from backbone.ledger.access import LedgerAccess
from backbone.ledger.database import LedgerDatabase
from backbone.ledger.usage_ledger import UsageLedger
from backbone.ledger.usage_query import PricedEvent, UsageQuery
from backbone.store import redis_keys
from backbone.store.budgets import BudgetKey, BudgetReport, BudgetStanding
from backbone.store.redis import RedisStore
from backbone.store.redis_budgets import RedisBudgetStore
from gateway.limits import budget_limiter, budget_reconciler
from gateway.limits.budget_ledger import LedgerSpend
from gateway.limits.budget_limiter import BudgetLimiter, Reservation
from gateway.limits.budget_meter import BudgetMeter, UnitPrices
from gateway.limits.budget_state import BudgetState
from gateway.limits.effective import AssignedBudget, EffectiveLimits
from schemas.budgets import Budget, BudgetPeriod, BudgetUnit
from schemas.errors import InsufficientQuota, NexusError, RateLimited, Unavailable
from schemas.jobs import Capability, JobRecord, JobStatus
from schemas.openai.chat import ChatRequest
from tests.unit.gateway.usage.sample import event, values

pytestmark = pytest.mark.asyncio(loop_scope="module")

DAY_S = 86_400
MIDNIGHT = 1_796_083_200
"""In December 2026."""
NOON = MIDNIGHT + DAY_S // 2
PRICES = UnitPrices(0.001, 0.0, 0.002, 0.0, 0.0, 0.5)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ledger(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[UsageLedger]:
    ledger = UsageLedger(LedgerDatabase(LedgerAccess(sqlite_file=tmp_path_factory.mktemp("ledger") / "ledger.db")))
    await ledger.add_up(UsageQuery(0, 1))  # opens the database
    yield ledger
    await ledger.close()


class Fleet:
    """Three gateways' limiters, with a clock of the test."""

    def __init__(self, stores: list[RedisStore], redis: Redis, ledger: UsageLedger) -> None:
        self.redis, self.store, self.ledger = redis, stores[0], ledger
        self.stores = [RedisBudgetStore(store) for store in stores]
        self.time = float(NOON)
        self.waiting: int | None = None
        """When the oldest event was stored that waits for the ledger."""
        self.announced: list[tuple[BudgetState, int]] = []
        self.refused = 0
        self.limiters = [self.limiter(store) for store in self.stores]
        self.team = uuid.uuid4().hex
        self.jobs = 0

    def limiter(self, store: RedisBudgetStore | None = None, ledger: UsageLedger | None = None) -> BudgetLimiter:
        async def oldest() -> int | None:
            return self.waiting

        async def announce(state: BudgetState, level: int) -> None:
            self.announced.append((state, level))

        def count(_: AssignedBudget) -> None:
            self.refused += 1

        source = LedgerSpend(ledger or self.ledger, oldest, lambda: "usd")
        meter = BudgetMeter(lambda _: PRICES, lambda: "usd")
        return BudgetLimiter(
            store or self.stores[0],
            meter,
            source,
            announce=announce,
            count_refused=count,
            clock=lambda: self.time,
        )

    def assigned(
        self, amount: float = 10_000, unit: str = "tokens", period: str = "day", **fields: Any
    ) -> AssignedBudget:
        budget = Budget(unit=BudgetUnit(unit), amount=amount, period=BudgetPeriod(period), **fields)
        return AssignedBudget("team", self.team, budget, "")

    def limits(self, *budgets: AssignedBudget) -> EffectiveLimits:
        return EffectiveLimits(budgets=budgets or (self.assigned(),))

    def event(self, tokens: int, **fields: Any) -> dict[str, Any]:
        """The fields of a finished run that took this many tokens, now."""
        self.jobs += 1
        usual = {"job": f"job_{uuid.uuid4().hex}", "team": self.team, "finished_ms": int(1000 * self.time)}
        return usual | {"input_tokens": tokens, "output_tokens": 0} | fields

    async def write(self, *events: dict[str, Any]) -> None:
        """Write finished runs into the ledger."""
        await self.ledger.store(
            PricedEvent(event(**fields), int(fields["input_tokens"]) * 10**6, "usd") for fields in events
        )

    async def ask(self, limiter: BudgetLimiter, limits: EffectiveLimits, tokens: int, used: int | None = None) -> None:
        """One request from its admission to the ledger. `tokens`: its estimate."""
        reservation = await reserve(limiter, limits, tokens)
        ended = self.event(tokens if used is None else used)
        reservation.settle(values(**ended))
        await self.write(ended)

    async def state(self, limiter: BudgetLimiter, assigned: AssignedBudget | None = None) -> BudgetState:
        await limiter.tick()
        return await limiter.state(assigned or self.assigned())

    async def ledger_tokens(self, start: int, end: int) -> int:
        query = UsageQuery(start, end, filters={"team": (self.team,)})
        return sum(row.sums["input_tokens"] + row.sums["output_tokens"] for row in await self.ledger.add_up(query))

    def key(self, assigned: AssignedBudget | None = None, start: int = MIDNIGHT) -> str:
        return redis_keys.budget((assigned or self.assigned()).name, start)


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(redis_url: str, ledger: UsageLedger) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(Redis.from_url(redis_url))
        stores = [RedisStore(redis_url) for _ in range(3)]
        for store in stores:
            stack.push_async_callback(store.close)
        yield Fleet(stores, redis, ledger)


def chat(tokens: int) -> ChatRequest:
    return ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens}
    )


async def reserve(limiter: BudgetLimiter, limits: EffectiveLimits, tokens: int) -> Reservation:
    return await limiter.reserve(limits, Capability.CHAT, chat(tokens), 0)


async def reconcile(limiter: BudgetLimiter) -> bool:
    return await limiter.reconciler.reconcile(limiter._budgets.values())


async def test_three_gateways_keep_one_budget(fleet: Fleet) -> None:
    """Together they admit all of it, with unequal load, and nothing above; then the refusal says all that a caller needs."""
    limits = fleet.limits()

    async def flood(limiter: BudgetLimiter, requests: int) -> int:
        admitted = 0
        for _ in range(requests):
            try:
                reservation = await reserve(limiter, limits, 100)
            except (InsufficientQuota, RateLimited):
                await limiter.tick()
                for budget in limiter._budgets.values():
                    budget.check_at = 0.0
                continue
            reservation.settle(values(**fleet.event(100)))
            admitted += 1
        await limiter.tick()
        return admitted

    first, second = fleet.limiters[:2]
    admitted = sum(await asyncio.gather(flood(first, 30), flood(second, 90)))
    for limiter in (first, second):
        await limiter.close()
    admitted += await flood(fleet.limiters[2], 60)
    assert admitted == 100
    state = await fleet.state(fleet.limiters[2])
    assert (state.spent, state.left) == (10_000, 0)
    with pytest.raises(InsufficientQuota) as caught:
        await reserve(fleet.limiters[2], limits, 1)
    info = caught.value.info
    assert (info.status, info.type, info.code) == (429, "insufficient_quota", "insufficient_quota")
    assert info.headers() == {"x-should-retry": "false"}
    assert "this team's budget of 10,000 tokens per day is used up" in info.message
    assert "renews at 2026-12-02T00:00:00Z" in info.message
    with pytest.raises(InsufficientQuota):
        await fleet.limiters[2].require_some(limits)
    assert fleet.refused


async def test_estimates_are_reserved_and_settled(fleet: Fleet) -> None:
    """Less than the estimate is free again; more is an overshoot, no larger than the request. A rest that is reserved comes back."""
    limiter, limits = fleet.limiters[0], fleet.limits()
    big = await reserve(limiter, limits, 9000)
    state = await fleet.state(limiter)
    assert (state.spent, state.reserved + state.left) == (0, 10_000)
    with pytest.raises(RateLimited) as reserved:
        await reserve(limiter, limits, 2000)
    assert reserved.value.info.headers() == {"retry-after": "5"}
    big.settle(values(**fleet.event(1000)))
    await limiter.tick()
    second = await reserve(limiter, limits, 8000)
    second.settle(values(**fleet.event(12_000)))
    assert (await fleet.state(limiter)).spent == 13_000
    with pytest.raises(InsufficientQuota):
        await reserve(fleet.limiters[1], limits, 1)


async def test_what_a_request_took_beyond_its_estimate_delays_no_other(fleet: Fleet) -> None:
    """It is spent, and the next request needs no more than its own estimate."""
    limiter, limits = fleet.limiters[0], fleet.limits()
    first, second = await reserve(limiter, limits, 10), await reserve(limiter, limits, 10)
    first.settle(values(**fleet.event(5000)))
    await limiter.tick()
    assert limiter._budgets[fleet.assigned().name].available >= 0
    second.settle(values(**fleet.event(10)))
    await fleet.ask(limiter, limits, 10)
    assert (await fleet.state(limiter)).spent == 5020


async def test_a_request_that_never_fits_is_told_so(fleet: Fleet) -> None:
    with pytest.raises(InsufficientQuota, match=r"10,000 tokens are left .* may use 20,000 tokens.*'max_tokens'"):
        await reserve(fleet.limiters[0], fleet.limits(), 20_000)


async def test_the_stricter_of_several_budgets_holds(fleet: Fleet) -> None:
    """Of a key and its team, in tokens, seconds and money; each counts all that was used."""
    seconds, cost = fleet.assigned(100, "slot_seconds", "week"), fleet.assigned(50, "cost", "month")
    key = AssignedBudget(
        "key", uuid.uuid4().hex, Budget(unit=BudgetUnit.TOKENS, amount=500, period=BudgetPeriod.MONTH), ""
    )
    limiter, limits = fleet.limiters[0], fleet.limits(key, seconds, cost)
    (await reserve(limiter, limits, 400)).settle(values(**fleet.event(300, slot_us=3_000_000)))
    with pytest.raises(InsufficientQuota, match="this API key's budget of 500 tokens per month"):
        await reserve(limiter, limits, 300)
    states = [await fleet.state(limiter, assigned) for assigned in limits.budgets]
    assert [state.spent for state in states] == [300, 3, pytest.approx(300 * 0.001 + 3 * 0.5)]
    assert [state.window.start for state in states] == [MIDNIGHT, MIDNIGHT - DAY_S, MIDNIGHT]


async def test_a_gateway_killed_between_reserve_and_settle(fleet: Fleet) -> None:
    """Its share is free after its lease; what it had not reported comes from the ledger."""
    killed, other = fleet.limiters[:2]
    limits = fleet.limits()
    await fleet.ask(killed, limits, 1000)
    await reserve(killed, limits, 6000)
    await fleet.write(fleet.event(500))  # its journal assigned the end of a request
    with pytest.raises(RateLimited):
        await reserve(other, limits, 5000)
    lease = f"l:{killed._gateway}"
    stored = await fleet.redis.hget(fleet.key(), lease)
    assert isinstance(stored, bytes)
    assigned = stored.decode().split()[0]
    await fleet.redis.hset(fleet.key(), lease, f"{assigned} 1")  # it has ended
    other._budgets[fleet.assigned().name].check_at = 0.0
    (await reserve(other, limits, 5000)).release()
    await fleet.state(other)
    fleet.time += 120
    assert await reconcile(other)
    assert (await fleet.state(other)).spent == await fleet.ledger_tokens(MIDNIGHT, NOON + DAY_S) == 1500


@pytest.mark.parametrize("all_forgot", [False, True])
async def test_redis_flushed(fleet: Fleet, all_forgot: bool) -> None:
    """What was spent comes back from the gateways' memory, and where these are new, from the ledger."""
    limits = fleet.limits()
    for limiter in fleet.limiters[:2]:
        await fleet.ask(limiter, limits, 3000)
        await limiter.tick()
    assert (await fleet.state(fleet.limiters[0])).spent == 6000
    await fleet.redis.delete(fleet.key())
    survivor = fleet.limiter() if all_forgot else fleet.limiters[0]
    await fleet.ask(survivor, limits, 1000)
    assert (await fleet.state(survivor)).spent == 7000
    with pytest.raises(InsufficientQuota):
        await reserve(survivor, limits, 4000)
    fleet.time += 120
    await reconcile(survivor)
    assert (await fleet.state(survivor)).spent == await fleet.ledger_tokens(MIDNIGHT, NOON + DAY_S) == 7000


async def test_the_ledger_is_away(fleet: Fleet, tmp_path: Path) -> None:
    """No request fails or waits for it. A gateway that knows nothing starts from zero, and learns once the ledger is back."""
    folder = tmp_path / "away"
    folder.write_text("no folder")
    away = UsageLedger(LedgerDatabase(LedgerAccess(sqlite_file=folder / "ledger.db")))
    limits = fleet.limits()
    await fleet.write(fleet.event(6000))
    fleet.time += 600
    blind = fleet.limiter(ledger=away)
    await fleet.ask(blind, limits, 100)
    assert (await fleet.state(blind)).spent == 100
    assert not await reconcile(blind)
    fleet.time += 2 * budget_reconciler.MERGE_S
    await fleet.ask(blind, limits, 100)
    assert not await reconcile(blind)
    assert (await fleet.state(blind)).spent == 200
    assert await fleet.redis.hlen(fleet.key()) <= 6  # reports are not piled up
    fleet.time += 120
    sighted = fleet.limiters[1]
    await fleet.state(sighted)
    await reconcile(sighted)
    assert (await fleet.state(blind)).spent == await fleet.ledger_tokens(MIDNIGHT, MIDNIGHT + DAY_S) == 6200


async def test_a_ledger_that_is_behind_lowers_nothing(fleet: Fleet) -> None:
    """While events wait for it, the reports hold; once all are written, the ledger's sum does."""
    limiter, limits = fleet.limiters[0], fleet.limits()
    (await reserve(limiter, limits, 800)).settle(values(**fleet.event(800)))
    await fleet.state(limiter)
    fleet.waiting = int(fleet.time)
    fleet.time += 120
    await reconcile(limiter)
    assert (await fleet.state(limiter)).spent == 800
    fleet.waiting, fleet.time = None, fleet.time + 120
    await reconcile(limiter)
    assert (await fleet.state(limiter)).spent == 0


async def test_stale_sums_are_reconciled_by_themselves(fleet: Fleet) -> None:
    limiter = fleet.limiters[0]
    await fleet.ask(limiter, fleet.limits(), 100)
    await fleet.state(limiter)
    await fleet.write(fleet.event(50))
    await limiter.reconcile_stale()
    assert (await fleet.state(limiter)).spent == 100
    fleet.time += budget_limiter.RECONCILE_S + 60
    await limiter.reconcile_stale()
    assert (await fleet.state(limiter)).spent == 150


@pytest.mark.parametrize("jump", [3600, -3600])
async def test_a_clock_that_jumps_by_an_hour(fleet: Fleet, jump: int) -> None:
    """Across the end of a period and back: each request counts where the ledger has it, in both periods."""
    limiter, limits = fleet.limiters[0], fleet.limits()
    fleet.time = MIDNIGHT + DAY_S + (-100 if jump > 0 else 100)
    before = fleet.time
    await fleet.ask(limiter, limits, 1000)
    opened = await reserve(limiter, limits, 500)
    fleet.time += jump
    await fleet.ask(limiter, limits, 2000)
    ended = fleet.event(700)
    opened.settle(values(**ended))
    await fleet.write(ended)
    state = await fleet.state(limiter)
    assert state.spent == 2700
    assert state.window.start == (MIDNIGHT + DAY_S if jump > 0 else MIDNIGHT)
    assert state.spent == await fleet.ledger_tokens(*state.window)
    fleet.time = before + 1
    await fleet.ask(limiter, limits, 4000)
    state = await fleet.state(limiter)
    assert state.spent == 5000
    assert state.spent == await fleet.ledger_tokens(*state.window)


async def test_a_budget_renews_at_midnight(fleet: Fleet) -> None:
    """Exactly then, also for a gateway that has just refused. Jobs of the day before count where they end."""
    limiter, limits = fleet.limiters[0], fleet.limits()
    fleet.time = MIDNIGHT + DAY_S - 1
    await fleet.ask(limiter, limits, 10_000)
    late = fleet.event(5)
    with pytest.raises(InsufficientQuota):
        await reserve(limiter, limits, 1)
    fleet.time = MIDNIGHT + DAY_S
    await fleet.ask(limiter, limits, 10_000)
    limiter.charge(limits, values(**late))  # a job that ended before, and whose outcome was recorded now
    await fleet.state(limiter)
    fleet.time = MIDNIGHT + DAY_S - 1
    assert (await fleet.state(limiter)).spent == 10_005


async def test_a_request_across_midnight(fleet: Fleet) -> None:
    """It counts where it ends, and in the budget of the month that goes on, once."""
    limiter, month = fleet.limiters[0], fleet.assigned(period="month")
    fleet.time = MIDNIGHT + DAY_S - 1
    opened = await reserve(limiter, fleet.limits(fleet.assigned(), month), 500)
    share = limiter._budgets[month.name]
    share_before = share.available + share.reserved
    fleet.time += 1
    opened.settle(values(**fleet.event(700)))
    assert share.available + share.reserved == share_before - 700
    assert [(await fleet.state(limiter, one)).spent for one in (fleet.assigned(), month)] == [700, 700]
    fleet.time -= 1
    assert (await fleet.state(limiter)).spent == 0


async def test_redis_is_away(fleet: Fleet) -> None:
    """Each gateway goes on with its part of what was left; all of it is counted afterwards."""
    limits = fleet.limits()
    for limiter in fleet.limiters[:2]:
        await fleet.ask(limiter, limits, 1000)
    for limiter in fleet.limiters[:2]:
        await limiter.tick()
        limiter._store = _Away()
    admitted = 0
    for limiter in fleet.limiters[:2]:
        with pytest.raises((InsufficientQuota, RateLimited)):
            for _ in range(20):
                await fleet.ask(limiter, limits, 1000)
                admitted += 1000
        with pytest.raises(Unavailable):
            await limiter.state(fleet.assigned())
    assert 3000 <= admitted <= 9000
    for limiter, store in zip(fleet.limiters[:2], fleet.stores, strict=False):
        limiter._store = store
        await limiter.tick()
    assert (await fleet.state(fleet.limiters[0])).spent == 2000 + admitted


class _Away:
    async def exchange(self, key: BudgetKey, gateway: str, report: BudgetReport) -> BudgetStanding | None:
        raise Unavailable("away")

    async def settle(self, key: BudgetKey, cut: int, spent: float, *, complete: bool) -> None:
        raise Unavailable("away")


async def test_open_jobs_are_reserved(fleet: Fleet) -> None:
    """By their number and their mean estimate, at any gateway; each ends with what it has used."""
    limits, records = fleet.limits(), []
    for tokens in (2000, 4000):
        (await reserve(fleet.limiters[0], limits, tokens)).hand_over()
        record = JobRecord(
            job=f"job_{uuid.uuid4().hex}",
            owner=fleet.team,
            endpoint="/v1/chat/completions",
            model="m",
            public_model="m",
            created_at=1,
        )
        await fleet.store.create(record, ttl_s=60)
        records.append(record)
    await fleet.limiters[0].tick()
    state = await fleet.state(fleet.limiters[1])
    assert state.reserved >= 6000
    assert state.left <= 4000
    with pytest.raises(RateLimited):
        await reserve(fleet.limiters[1], limits, 5000)
    for record in records:
        await fleet.store.move(fleet.team, record.job, JobStatus.COMPLETED)
        fleet.limiters[2].charge(limits, values(**fleet.event(100)))
    await fleet.limiters[2].tick()
    await fleet.limiters[0].close()
    state = await fleet.state(fleet.limiters[1])
    assert (state.spent, state.reserved) == (200, 0)


async def test_a_warning_and_the_end_are_announced_once(fleet: Fleet) -> None:
    """By whichever gateway sees it, and again once the amount was changed."""
    assigned = fleet.assigned(warn_at=0.8)
    limits = fleet.limits(assigned)
    for _ in range(7):
        await fleet.ask(fleet.limiters[0], limits, 1000)
        await fleet.state(fleet.limiters[0], assigned)
    assert not fleet.announced
    await fleet.ask(fleet.limiters[1], limits, 1000)
    for limiter in [*fleet.limiters, *fleet.limiters]:
        await fleet.state(limiter, assigned)
    [(state, level)] = fleet.announced
    assert (level, state.spent) == (1, 8000)
    await fleet.ask(fleet.limiters[0], limits, 100, used=2000)
    for limiter in [*fleet.limiters, *fleet.limiters]:
        await fleet.state(limiter, assigned)
    assert [level for _, level in fleet.announced] == [1, 2]
    more = fleet.assigned(12_000, warn_at=0.8)
    for limiter in fleet.limiters:
        limiter._current(more)
    for limiter in [*fleet.limiters, *fleet.limiters]:
        await fleet.state(limiter, more)
    assert [level for _, level in fleet.announced] == [1, 2, 1]


async def test_a_changed_amount_holds_at_once(fleet: Fleet) -> None:
    limiter = fleet.limiters[0]
    await fleet.ask(limiter, fleet.limits(), 5000)
    (await reserve(limiter, fleet.limits(), 3000)).release()
    with pytest.raises(InsufficientQuota, match="used up"):
        await reserve(limiter, fleet.limits(fleet.assigned(5000)), 1000)
    await fleet.ask(limiter, fleet.limits(fleet.assigned(7000)), 1000)
    with pytest.raises(NexusError):
        await reserve(limiter, fleet.limits(fleet.assigned(7000)), 3000)


async def test_a_request_waits_for_no_store_while_shares_are_here(fleet: Fleet) -> None:
    """After the first ones, shares are taken ahead of need."""
    limiter, limits = fleet.limiters[0], fleet.limits(fleet.assigned(1_000_000))
    for _ in range(10):
        for _ in range(50):
            (await reserve(limiter, limits, 10)).settle(values(**fleet.event(10)))
        await limiter.tick()
    found = [limiter.try_reserve(limits, Capability.CHAT, chat(10), 0) for _ in range(50)]
    assert all(found)


async def test_an_idle_share_is_given_back_and_forgotten(fleet: Fleet) -> None:
    limiter, limits = fleet.limiters[0], fleet.limits()
    await fleet.ask(limiter, limits, 2000)
    await limiter.tick()
    budget = limiter._budgets[fleet.assigned().name]
    assert budget.available
    budget.used_at -= budget_limiter.FORGET_S + 1
    budget.recent = 0.0
    await limiter.tick()
    assert (await fleet.state(fleet.limiters[1])).reserved == 0
    await limiter.tick()
    assert not limiter._budgets
