"""Which queue a free slot pulls next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backbone.bus.bus import Queue
from schemas.jobs import Capability, Lane
from workers.queue_selector import AGING_JOBS, AGING_S, QueueSelector

HIGH, MID, LOW = (Queue(Capability.CHAT, lane, "a") for lane in (Lane.PRIORITY, Lane.DEFAULT, Lane.FLEX))
OTHER = Queue(Capability.CHAT, Lane.DEFAULT, "b")
NOTHING: frozenset[str] = frozenset()


def selector_of(*queues: Queue) -> QueueSelector:
    made = QueueSelector()
    made.serve(list(queues))
    return made


def test_the_higher_lane_goes_first() -> None:
    """Priority before default before flex, whatever came first."""
    selector = selector_of(LOW, MID, HIGH)
    for now, queue in enumerate((LOW, MID, HIGH)):
        selector.record_notification(queue, now)
    assert selector.rank_queues(NOTHING, 3) == [HIGH, MID, LOW]


def test_the_loaded_model_goes_first_within_a_lane() -> None:
    """A swap costs seconds, so the model in memory is preferred, but not above a higher lane."""
    selector = selector_of(MID, OTHER, HIGH)
    for now, queue in enumerate((MID, OTHER, HIGH)):
        selector.record_notification(queue, now)
    assert selector.rank_queues(frozenset({"b"}), 3) == [HIGH, OTHER, MID]


def test_a_passed_over_lane_gets_its_turn_within_eight_jobs() -> None:
    """With an endless supply of priority jobs, the head of the flex lane starts after at most eight of them."""
    selector = selector_of(HIGH, LOW)
    selector.record_notification(LOW, 0)
    taken = []
    for now in range(2 * (AGING_JOBS + 1)):
        selector.record_notification(HIGH, now)
        queue = selector.rank_queues(NOTHING, now)[0]
        taken.append(queue)
        selector.record_job(queue, 1, now)
    assert taken.index(LOW) == AGING_JOBS
    assert taken.count(LOW) == 2


def test_a_lane_that_waited_long_gets_its_turn() -> None:
    """Thirty seconds are enough, even when few jobs pass it over."""
    selector = selector_of(HIGH, LOW)
    selector.record_notification(LOW, 0)
    selector.record_notification(HIGH, AGING_S)
    assert selector.rank_queues(NOTHING, AGING_S)[0] == LOW


def test_an_unloaded_model_does_not_starve() -> None:
    """The same holds between models: the loaded one is preferred for eight jobs, not forever."""
    selector = selector_of(MID, OTHER)
    selector.record_notification(OTHER, 0)
    taken = []
    for now in range(AGING_JOBS + 1):
        selector.record_notification(MID, now)
        taken.append(selector.rank_queues(frozenset({"a"}), now)[0])
        selector.record_job(taken[-1], 1, now)
    assert OTHER in taken


def test_an_empty_queue_is_not_asked() -> None:
    """An empty queue is left out until the next notification."""
    selector = selector_of(HIGH, LOW)
    selector.record_notification(HIGH, 0)
    selector.record_job(HIGH, 0, 0)
    assert selector.rank_queues(NOTHING, 1) == []
    selector.record_notification(HIGH, 1)
    selector.record_empty(HIGH)
    assert selector.rank_queues(NOTHING, 1) == []


@given(st.lists(st.tuples(st.sampled_from([HIGH, MID, LOW, OTHER]), st.booleans()), max_size=60))
def test_no_waiting_queue_is_passed_over_for_long(events: list[tuple[Queue, bool]]) -> None:
    """Whatever arrives, no waiting head sees more than eight jobs, and one per other aged queue, go before it."""
    queues = [HIGH, MID, LOW, OTHER]
    selector = selector_of(*queues)
    waiting = dict.fromkeys(queues, 0)
    passed = dict.fromkeys(queues, 0)
    for now, (queue, take) in enumerate(events):
        selector.record_notification(queue, now / 100)
        waiting[queue] += 1
        if not take:
            continue
        chosen = selector.rank_queues(NOTHING, now / 100)[0]
        waiting[chosen] -= 1
        selector.record_job(chosen, waiting[chosen], now / 100)
        passed[chosen] = 0
        for other in queues:
            if other != chosen and waiting[other]:
                passed[other] += 1
        assert max(passed.values()) <= AGING_JOBS + len(queues)
