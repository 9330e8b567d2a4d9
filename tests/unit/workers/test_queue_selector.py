"""Whose turn it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backbone.bus.bus import Queue
from schemas.jobs import Capability, Lane
from workers.queue_selector import AGED_JOBS, AGED_S, QueueSelector

HIGH, MID, LOW = (Queue(Capability.CHAT, lane, "a") for lane in (Lane.PRIORITY, Lane.DEFAULT, Lane.FLEX))
OTHER = Queue(Capability.CHAT, Lane.DEFAULT, "b")
NOTHING: frozenset[str] = frozenset()


def book(*queues: Queue) -> QueueSelector:
    made = QueueSelector()
    made.serve(list(queues))
    return made


def test_the_higher_lane_goes_first() -> None:
    """Priority before default before flex, whatever came first."""
    lanes = book(LOW, MID, HIGH)
    for now, queue in enumerate((LOW, MID, HIGH)):
        lanes.rang(queue, now)
    assert lanes.order(NOTHING, 3) == [HIGH, MID, LOW]


def test_the_loaded_model_goes_first_within_a_lane() -> None:
    """A swap costs seconds, so the model in memory is preferred, but not above a higher lane."""
    lanes = book(MID, OTHER, HIGH)
    for now, queue in enumerate((MID, OTHER, HIGH)):
        lanes.rang(queue, now)
    assert lanes.order(frozenset({"b"}), 3) == [HIGH, OTHER, MID]


def test_a_passed_over_lane_gets_its_turn_within_eight_jobs() -> None:
    """With an endless supply of priority jobs, the head of the flex lane starts after at most eight of them."""
    lanes = book(HIGH, LOW)
    lanes.rang(LOW, 0)
    taken = []
    for now in range(2 * (AGED_JOBS + 1)):
        lanes.rang(HIGH, now)
        queue = lanes.order(NOTHING, now)[0]
        taken.append(queue)
        lanes.took(queue, 1, now)
    assert taken.index(LOW) == AGED_JOBS
    assert taken.count(LOW) == 2


def test_a_lane_that_waited_long_gets_its_turn() -> None:
    """Thirty seconds are enough, even when few jobs go before."""
    lanes = book(HIGH, LOW)
    lanes.rang(LOW, 0)
    lanes.rang(HIGH, AGED_S)
    assert lanes.order(NOTHING, AGED_S)[0] == LOW


def test_an_unloaded_model_does_not_starve() -> None:
    """The same holds between models: the loaded one is preferred for eight jobs, not for ever."""
    lanes = book(MID, OTHER)
    lanes.rang(OTHER, 0)
    taken = []
    for now in range(AGED_JOBS + 1):
        lanes.rang(MID, now)
        taken.append(lanes.order(frozenset({"a"}), now)[0])
        lanes.took(taken[-1], 1, now)
    assert OTHER in taken


def test_an_empty_queue_is_not_asked() -> None:
    """What is known to be empty is left out until the bell rings again."""
    lanes = book(HIGH, LOW)
    lanes.rang(HIGH, 0)
    lanes.took(HIGH, 0, 0)
    assert lanes.order(NOTHING, 1) == []
    lanes.rang(HIGH, 1)
    lanes.empty(HIGH)
    assert lanes.order(NOTHING, 1) == []


@given(st.lists(st.tuples(st.sampled_from([HIGH, MID, LOW, OTHER]), st.booleans()), max_size=60))
def test_no_waiting_queue_is_passed_over_for_long(events: list[tuple[Queue, bool]]) -> None:
    """Whatever arrives, no waiting head sees more than eight jobs, and one per other aged queue, go before it."""
    queues = [HIGH, MID, LOW, OTHER]
    lanes = book(*queues)
    waiting = dict.fromkeys(queues, 0)
    passed = dict.fromkeys(queues, 0)
    for now, (queue, take) in enumerate(events):
        lanes.rang(queue, now / 100)
        waiting[queue] += 1
        if not take:
            continue
        chosen = lanes.order(NOTHING, now / 100)[0]
        waiting[chosen] -= 1
        lanes.took(chosen, waiting[chosen], now / 100)
        passed[chosen] = 0
        for other in queues:
            if other != chosen and waiting[other]:
                passed[other] += 1
        assert max(passed.values()) <= AGED_JOBS + len(queues)
