"""Budgets' periods, and what requests take of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from gateway.limits.budget_meter import FIRST_SLOT_SECONDS, LEAST, BudgetMeter
from gateway.limits.budget_periods import window_at
from gateway.limits.budget_state import describe_amount
from gateway.usage.prices import ModelPrice, PriceList
from schemas.budgets import BudgetPeriod, BudgetUnit
from schemas.jobs import Capability
from schemas.openai.chat import ChatRequest
from schemas.openai.images import ImageGenerationRequest
from tests.unit.gateway.usage.sample import event, values


def at(text: str) -> int:
    return int(datetime.fromisoformat(text + "+00:00").timestamp())


@pytest.mark.parametrize(
    ("period", "moment", "start", "end"),
    [
        ("day", "2026-11-30T23:59:59", "2026-11-30", "2026-12-01"),
        ("day", "2026-12-01T00:00:00", "2026-12-01", "2026-12-02"),
        ("week", "2026-11-30T00:00:00", "2026-11-30", "2026-12-07"),
        ("week", "2027-01-03T23:59:59", "2026-12-28", "2027-01-04"),
        ("month", "2028-02-29T12:00:00", "2028-02-01", "2028-03-01"),
        ("month", "2026-12-31T23:59:59", "2026-12-01", "2027-01-01"),
    ],
)
def test_calendar_periods(period: str, moment: str, start: str, end: str) -> None:
    """In UTC: midnight, Monday, the first of a month."""
    assert window_at(BudgetPeriod(period), at(moment)) == (at(start), at(end))


@pytest.mark.parametrize("period", list(BudgetPeriod))
def test_periods_follow_one_another(period: BudgetPeriod) -> None:
    """Each begins where the one before it ends, over years."""
    window, last = window_at(period, at("2026-01-01")), at("2029-01-01")
    while window.end < last:
        following = window_at(period, window.end)
        assert following.start == window.end
        assert window_at(period, window.end - 1) == window
        assert timedelta(seconds=following.end - following.start) <= timedelta(days=31)
        window = following
    assert datetime.fromtimestamp(window.end, UTC).hour == 0


PRICE = ModelPrice(
    model="smol*",
    input_per_1m=Decimal("0.15"),
    cached_per_1m=Decimal("0.05"),
    output_per_1m=Decimal("0.6"),
    per_image=Decimal("0.02"),
    per_audio_second=Decimal("0.001"),
    per_slot_second=Decimal("0.0003"),
)
PRICES = PriceList(currency="usd", prices=(PRICE,))
REQUEST = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}


def meter() -> BudgetMeter:
    return BudgetMeter(PRICES.unit_prices, lambda: "usd")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cached_tokens": 40},
        {"cached_tokens": 500},
        {"images": 3, "audio_ms": 1500},
        {"model": "free", "slot_us": 0},
    ],
)
def test_what_was_used_is_what_the_ledger_has(fields: dict[str, int]) -> None:
    """Tokens, seconds and cost of an event, as the ledger's writer counts them."""
    used = meter().measure(values(**fields), tokens_only=False)
    stored = event(**fields)
    cost_nanos, _ = PRICES.price(stored)
    assert used[:2] == (stored.input_tokens + stored.output_tokens, stored.slot_us / 1e6)
    assert used[2] == pytest.approx(cost_nanos / 1e9, abs=2e-9)
    assert meter().measure(values(**fields), tokens_only=True)[0] == used[0]


def test_estimates_learn_a_models_time_and_name() -> None:
    """The first is by the size and `max_tokens` alone; an alias has the price of the model that it led to."""
    one = meter()
    request = ChatRequest.model_validate(REQUEST)
    assert one.estimate(Capability.CHAT, request, 400, tokens_only=False) == (200, FIRST_SLOT_SECONDS, LEAST[2])
    one.measure(values(), tokens_only=False)
    tokens, seconds, cost = one.estimate(Capability.CHAT, request, 400, tokens_only=False)
    assert (tokens, seconds) == (200, 2.0)
    assert cost == pytest.approx(100 * 0.15e-6 + 100 * 0.6e-6 + 2 * 0.0003)


def test_every_request_takes_something() -> None:
    """So that a budget that is used up admits none."""
    request = ImageGenerationRequest.model_validate({"model": "smolsd", "prompt": "a cat", "n": 3})
    tokens, _, cost = meter().estimate(Capability.IMAGES, request, 100, tokens_only=False)
    assert tokens == LEAST[0]
    assert cost == pytest.approx(0.06 + FIRST_SLOT_SECONDS * 0.0003)
    assert BudgetMeter().estimate(Capability.IMAGES, request, 100, tokens_only=True)[0] > 0


def test_amounts_in_words() -> None:
    assert describe_amount(1_000_000, BudgetUnit.TOKENS, "") == "1,000,000 tokens"
    assert describe_amount(2.5, BudgetUnit.SLOT_SECONDS, "") == "2.5 slot-seconds"
    assert describe_amount(10, BudgetUnit.COST, "usd") == "10 usd"
