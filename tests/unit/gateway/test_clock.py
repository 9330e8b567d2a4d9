"""One clock for all gateways: a process measures how far its own is from NATS's, and corrects what it stamps by that."""

from __future__ import annotations

import pytest

from backbone.clock import Clock
from gateway.clock import MAX_OFFSET_S, ClockSync
from schemas.errors import Unavailable


class Host:
    """A host whose clock is wrong, and whose steady clock is not."""

    def __init__(self, ahead_s: float) -> None:
        self.elapsed = 100.0
        self.ahead_s = ahead_s
        self.trip_s = 0.01
        self.server_s = 1_000_000.0
        """The true time at the beginning."""

    def wall(self) -> float:
        return self.true() + self.ahead_s

    def true(self) -> float:
        return self.server_s + self.elapsed - 100.0

    def steady(self) -> float:
        return self.elapsed

    async def ask(self) -> float:
        self.elapsed += self.trip_s / 2
        answer = self.true()
        self.elapsed += self.trip_s / 2
        return answer


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0, 2.0])
async def test_a_wrong_clock_is_corrected_and_named(ahead_s: float) -> None:
    """After the first look, within the round trip; the operator reads which way it is off."""
    host = Host(ahead_s)
    clock = Clock(host.wall, host.steady)
    keeper = ClockSync(host.ask, clock)
    assert clock.now() == pytest.approx(host.true() + ahead_s)
    await keeper.poll()
    assert clock.now() == pytest.approx(host.true(), abs=host.trip_s)
    with pytest.raises(Unavailable, match="ahead of" if ahead_s > 0 else "behind"):
        await keeper.check()


async def test_steps_of_the_hosts_clock_move_nothing() -> None:
    """Somebody sets the clock, right or wrong: what is stamped goes on steadily."""
    host = Host(0.0)
    clock = Clock(host.wall, host.steady)
    keeper = ClockSync(host.ask, clock)
    await keeper.poll()
    await keeper.check()
    host.ahead_s = 7200.0
    host.elapsed += 1.0
    assert clock.now() == pytest.approx(host.true(), abs=0.05)


async def test_small_differences_are_approached_and_never_overshot() -> None:
    """Two servers of a cluster differ a little: time does not jump to and fro."""
    host = Host(0.0)
    clock = Clock(host.wall, host.steady)
    keeper = ClockSync(host.ask, clock)
    await keeper.poll()
    host.server_s += 0.4
    errors = []
    for _ in range(20):
        host.elapsed += 10.0
        await keeper.poll()
        errors.append(host.true() - clock.now())
    assert errors == sorted(errors, reverse=True)
    assert 0 <= errors[-1] < 0.02
    assert abs(clock.ahead_s) < MAX_OFFSET_S


async def test_a_slow_answer_is_dropped() -> None:
    """It says too little about when the server read its clock."""
    host = Host(3600.0)
    clock = Clock(host.wall, host.steady)
    host.trip_s = 5.0
    await ClockSync(host.ask, clock).poll()
    assert clock.ahead_s == pytest.approx(0.0)
