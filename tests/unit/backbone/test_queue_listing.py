"""The order of a model's waiting jobs, and the cursors of its pages."""

from __future__ import annotations

import pytest

from backbone.bus.bus import Queue
from backbone.bus.fair_order import FairOrder
from backbone.bus.queue_listing import PASSED_OVER_LIMIT, PageCursor, QueuedJob, lane_order, parse_queued_job
from schemas.jobs import Capability, Envelope, Lane
from workers.queue_selector import AGING_JOBS, QueueSelector

HIGH, LOW = (Queue(Capability.CHAT, lane, "m") for lane in (Lane.PRIORITY, Lane.FLEX))


def queued(queue: Queue, seq: int, backlog: str = "") -> QueuedJob:
    return QueuedJob(queue, seq, f"job_{seq}", 1, "alice", "/v1/chat/completions", "m", True, "", 0, 10, backlog)


def test_lanes_take_turns_as_workers_choose_them() -> None:
    """The listing shows what `workers.queue_selector` will do, whose bound is the same."""
    assert PASSED_OVER_LIMIT == AGING_JOBS
    left = {HIGH: 20, LOW: 3}
    order = list(lane_order(left, {}))
    selector, chosen = QueueSelector(), []
    selector.serve([HIGH, LOW])
    for queue, count in left.items():
        for _ in range(count):
            selector.record_notification(queue, 0.0)
    while selector.has_waiting:
        queue = selector.rank_queues(frozenset({"m"}), 0.0)[0]
        chosen.append(queue)
        left[queue] -= 1
        selector.record_job(queue, left[queue], 0.0)
    assert order == chosen


def test_owners_come_in_the_order_in_which_they_are_taken() -> None:
    """Also from the middle on, as the next page begins."""
    weights = {"heavy": 3.0, "light": 1.0}
    order = FairOrder(weights.__getitem__)
    counts = {"heavy": 30, "light": 10}
    for owner, count in counts.items():
        order.set_waiting(owner, count)
    first = list(order.upcoming(counts, {}))
    skipped = {owner: first[:12].count(owner) for owner in counts}
    left = {owner: count - skipped[owner] for owner, count in counts.items()}
    rest = list(order.upcoming(left, skipped))
    assert [order.take() for _ in range(40)] == first
    assert first == first[:12] + rest


def test_a_cursor_goes_on_where_the_page_has_ended() -> None:
    """It holds the last job of each owner, and how long each lane was passed over."""
    cursor = PageCursor()
    cursor.advance([queued(HIGH, 5), queued(HIGH, 1 << 52, "alice"), queued(LOW, 7)], [HIGH, LOW])
    text = cursor.encode()
    assert text is not None
    found = PageCursor.decode(text, "m")
    assert found == cursor
    assert (found.position, found.queues[HIGH].passed_over, found.queues[HIGH].owners) == (3, 1, {"alice": 1 << 52})
    cursor.advance([queued(LOW, 1 << 52, f"owner-{number}") for number in range(501)], [LOW])
    assert cursor.encode() is None
    for wrong in ("x", "!!", "e30", text[:-4]):
        with pytest.raises(ValueError, match="cursor"):
            PageCursor.decode(wrong, "m")


def test_a_message_says_what_is_shown() -> None:
    """Anything else that is stored there is left out, and is no error of the page."""
    envelope = Envelope(
        job="job_1", endpoint="/v1/chat/completions", capability=Capability.CHAT, model="m", public_model="alias",
        reply="nexus.events.job_1", owner="alice", durable=True,
    )  # fmt: skip
    found = parse_queued_job(HIGH, 3, envelope.encode(b"12345"), 1_700_000_000)
    assert found is not None
    assert (found.job, found.owner, found.public_model, found.size) == ("job_1", "alice", "alias", 5)
    blob = parse_queued_job(HIGH, 3, envelope.model_copy(update={"body_blob": "ab", "body_size": 9_000}).encode(b""), 0)
    assert blob is not None
    assert blob.size == 9_000
    assert parse_queued_job(HIGH, 3, b"nonsense", 0) is None
