"""The order in which owners' jobs start: shares by weight, in seconds of a slot."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbone.bus.fair_order import MAX_IDLE_OWNERS, FairOrder


def starts(order: FairOrder, count: int) -> list[str]:
    """The owners of the next `count` jobs."""
    return [owner for _ in range(count) if (owner := order.take()) is not None]


def waiting(**counts: int) -> FairOrder:
    order = FairOrder()
    for owner, count in counts.items():
        order.set_waiting(owner, count)
    return order


class TestOrder:
    def test_newcomer(self):
        """A single job of an owner who did not wait before starts next or second, however many wait."""
        order = waiting(busy=10_000)
        starts(order, 5_000)
        order.add_waiting("new")
        assert "new" in starts(order, 2)

    def test_alone(self):
        """An owner who waits alone gets every slot, and owes nothing for it afterwards."""
        order = waiting(alone=500)
        assert starts(order, 500) == ["alone"] * 500
        order.set_waiting("alone", 50)
        order.set_waiting("other", 50)
        assert Counter(starts(order, 40))["alone"] == 20

    def test_nobody_waits(self):
        """Without a waiting job there is no next owner."""
        order = waiting(a=1)
        assert starts(order, 2) == ["a"]
        assert (order.take(), order.total, order.owners) == (None, 0, [])

    def test_time_without_waiting(self):
        """An owner does not save up shares while it does not wait."""
        order = waiting(a=1, b=1000)
        starts(order, 500)
        order.set_waiting("a", 500)
        assert Counter(starts(order, 100))["a"] == 50

    def test_cancelled_jobs(self):
        """An owner whose jobs were all cancelled is passed over."""
        order = waiting(a=5, b=5)
        order.set_waiting("a", 0)
        assert starts(order, 5) == ["b"] * 5

    def test_missing_job(self):
        """A turn for a job that was gone is given back."""
        order = waiting(a=10, b=10)
        owner = order.take()
        assert owner is not None
        order.refund(owner)
        assert order.take() == owner

    def test_idle_owners_are_forgotten(self):
        """Memory depends on the owners that wait, not on all that ever did."""
        order = FairOrder()
        for number in range(3 * MAX_IDLE_OWNERS):
            order.add_waiting(str(number))
            order.take()
        assert len(order._owners) <= 1.5 * MAX_IDLE_OWNERS


@pytest.mark.parametrize("seed", range(3))
def test_shares_in_seconds(seed: int) -> None:
    """Over a minute of one slot, each busy owner's seconds differ from its weight by at most 5 %, whatever its jobs take."""
    rng = random.Random(seed)
    weights = {"a": 1, "b": 2, "c": 5}
    means = {"a": 0.02, "b": 0.3, "c": 0.1}
    order = FairOrder(lambda owner: weights[owner])
    for owner in weights:
        order.set_waiting(owner, 10_000)
    used = dict.fromkeys(weights, 0.0)
    while sum(used.values()) < 60:
        taken = order.take()
        assert taken is not None
        seconds = means[taken] * rng.uniform(0.2, 1.8)
        used[taken] += seconds
        order.record_use(taken, seconds)
    for owner, weight in weights.items():
        share = used[owner] / sum(used.values())
        assert share == pytest.approx(weight / 8, rel=0.05)


OWNERS = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=6
)


@settings(max_examples=30, deadline=None)
@given(owners=OWNERS, started=st.integers(0, 30))
def test_positions_and_starvation(owners: dict[str, tuple[int, int]], started: int) -> None:
    """A job's position is its place in the order of starts; every job starts, and none more often than it waits."""
    order = FairOrder(lambda owner: owners[owner][1])
    for owner, (count, _) in owners.items():
        order.set_waiting(owner, count)
    starts(order, started)
    left = order.snapshot()
    told = {(owner, index): order.position(owner, index) for owner, count in left.items() for index in range(count)}
    ahead: Counter[str] = Counter()
    for place, name in enumerate(starts(order, sum(left.values()))):
        assert told[name, ahead[name]] == place
        ahead[name] += 1
    assert dict(ahead) == left


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=6))
def test_equal_owners(counts: list[int]) -> None:
    """While all wait, no owner is ever more than one job ahead of another."""
    order = FairOrder()
    for number, count in enumerate(counts):
        order.set_waiting(str(number), count)
    seen: Counter[str] = Counter({str(number): 0 for number in range(len(counts))})
    while all(order.waiting(str(number)) for number in range(len(counts))):
        seen.update([order.take() or ""])
        assert max(seen.values()) - min(seen.values()) <= 1
