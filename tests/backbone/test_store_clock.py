"""How old a message is, by stamps of a clock that is not ours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backbone.bus.nats.store_clock import MAX_CLOCK_DRIFT, StoreClock

SECOND = 1_000_000_000


def test_the_first_message_may_be_of_any_age() -> None:
    """There is nothing yet to compare it with."""
    assert StoreClock().age_s(7 * SECOND, 1.0) == float("inf")


@given(
    offset=st.floats(-1e9, 1e9),
    waits=st.lists(st.floats(0.0, 60.0), min_size=1, max_size=50),
    delay=st.floats(0.0, 0.01),
)
def test_waits_are_told_once_a_fresh_message_was_seen(offset: float, waits: list[float], delay: float) -> None:
    """Whatever the two clocks say: each later message is as old as it is, but for the drift that is allowed."""
    clock, now = StoreClock(), 1000.0
    clock.age_s(int((now - delay + offset) * SECOND), now)
    for number, wait in enumerate(waits, start=1):
        at = now + number
        age = clock.age_s(int((at - wait - delay + offset) * SECOND), at)
        assert abs(age - wait) <= number * MAX_CLOCK_DRIFT + 1e-3


def test_a_clock_that_is_set_back_makes_messages_older_never_younger() -> None:
    """A job then waits for its gateway's answer, which costs a moment; it never begins for a caller who is gone."""
    clock = StoreClock()
    clock.age_s(100 * SECOND, 50.0)
    assert clock.age_s(99 * SECOND, 51.0) > 1.9
    assert clock.age_s(102 * SECOND, 54.0) > 1.9


def test_a_clock_that_is_set_forward_is_followed_at_once() -> None:
    clock = StoreClock()
    clock.age_s(100 * SECOND, 50.0)
    assert clock.age_s(161 * SECOND, 51.0) == 0.0
    assert abs(clock.age_s(162 * SECOND, 52.5) - 0.5) < 0.001
