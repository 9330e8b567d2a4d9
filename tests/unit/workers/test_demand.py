"""When a worker keeps a pull open on a queue: by its own jobs, or by wake-up notifications."""

from __future__ import annotations

from workers.demand import HOT_RATE, MAX_IGNORED_TICKS, TICK_S, Demand

MANY = int(HOT_RATE * TICK_S)
SHARE = 16


def hear(demand: Demand, ticks: int) -> list[bool]:
    """Notify the demand of as many jobs as make it hot, for `ticks` ticks; return for each tick whether it would be hot."""
    became = []
    for _ in range(ticks):
        demand.notifications = MANY
        became.append(demand.tick(SHARE))
    return became


def test_a_worker_beside_a_quicker_one_becomes_hot_by_what_it_hears():
    """After two consecutive ticks, as with jobs of its own; it reserves one slot until jobs come."""
    demand = Demand()
    assert hear(demand, 2) == [False, True]
    assert demand.target == 1


def test_a_busy_queue_beside_too_many_others_does_not_linger():
    """It stays cold, however many notifications come."""
    demand = Demand()
    for _ in range(4):
        demand.notifications = MANY
        assert not demand.tick(0)


def test_promises_in_vain_make_it_deaf_for_longer_each_time():
    """Of a thousand idle workers, few linger; a worker's own jobs count all the same."""
    demand = Demand()
    waits = []
    for _ in range(10):
        demand.cool_down()
        waits.append(hear(demand, 3 * MAX_IGNORED_TICKS).index(True) + 1)
    assert waits[:3] == [3, 4, 6]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_IGNORED_TICKS + 2
    demand = Demand(ignored_ticks=MAX_IGNORED_TICKS)
    demand.arrivals = MANY
    assert not demand.tick(SHARE)
    demand.arrivals = MANY
    assert demand.tick(SHARE)
