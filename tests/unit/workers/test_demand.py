"""When a worker keeps a pull open on a queue: by the jobs that come to it, or by those that it hears of."""

from __future__ import annotations

from workers.demand import HOT_RATE, MAX_DEAF_TICKS, TICK_S, Demand

MANY = int(HOT_RATE * TICK_S)
SHARE = 16


def hear(flow: Demand, ticks: int) -> list[bool]:
    """Let the flow hear of as many jobs as make it hot, for so many ticks; return after which it would be hot."""
    became = []
    for _ in range(ticks):
        flow.heard = MANY
        became.append(flow.tick(SHARE))
    return became


def test_a_worker_beside_a_quicker_one_becomes_hot_by_what_it_hears():
    """In two ticks together, as by jobs of its own; it promises one slot until jobs come."""
    flow = Demand()
    assert hear(flow, 2) == [False, True]
    assert flow.target == 1


def test_a_busy_queue_beside_too_many_others_does_not_linger():
    """Whatever is heard."""
    flow = Demand()
    for _ in range(4):
        flow.heard = MANY
        assert not flow.tick(0)


def test_promises_in_vain_make_it_deaf_for_longer_each_time():
    """So that few of a thousand idle workers linger; jobs of its own count all the same."""
    flow = Demand()
    waits = []
    for _ in range(10):
        flow.ran_out()
        waits.append(hear(flow, 3 * MAX_DEAF_TICKS).index(True) + 1)
    assert waits[:3] == [3, 4, 6]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_DEAF_TICKS + 2
    flow = Demand(deaf_ticks=MAX_DEAF_TICKS)
    flow.arrived = MANY
    assert not flow.tick(SHARE)
    flow.arrived = MANY
    assert flow.tick(SHARE)
