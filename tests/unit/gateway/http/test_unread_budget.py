"""The budget of unread answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.http.unread_budget import UnreadBudget


class Stored:
    """Stores bytes for a caller."""

    def __init__(self, budget: UnreadBudget, owner: str) -> None:
        self.budget, self.owner = budget, owner
        self.size = self.times_shed = 0

    def hold(self, size: int) -> None:
        self.size = size
        self.budget.record(self, size)

    def shed(self) -> None:
        self.size = 0
        self.times_shed += 1


def test_the_owner_that_holds_most_loses_its_largest() -> None:
    """One owner with many answers is cut, not the one whose single answer is larger than each of them."""
    budget = UnreadBudget(1000)
    honest = Stored(budget, "honest")
    honest.hold(300)
    hoard = [Stored(budget, "hoarder") for _ in range(7)]
    for number, stored in enumerate(hoard):
        stored.hold(100 + number)
    assert [stored.times_shed for stored in hoard] == [0] * 6 + [1]
    assert (honest.size, honest.times_shed, budget.shed) == (300, 0, 1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 400)), max_size=60))
def test_the_sum_is_true_and_bounded(steps: list[tuple[int, int]]) -> None:
    """Whatever is stored and read, the sum is what is stored, and within the bound."""
    budget = UnreadBudget(1000)
    holders = [Stored(budget, f"owner-{number % 3}") for number in range(10)]
    for number, size in steps:
        holders[number].hold(size)
        assert budget.total == sum(holder.size for holder in holders) <= 1000
    for holder in holders:
        holder.hold(0)
    assert (budget.total, len(budget._by_owner), len(budget._sizes)) == (0, 0, 0)
