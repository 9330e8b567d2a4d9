"""The state machine of a synchronous request: attempts are never mixed, and an end is never false."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.http.unread_budget import UnreadBudget
from gateway.sync.request_state import MAX_UNREAD_BYTES, SILENCE_GRACE_S, RequestState, SyncRequest
from schemas.errors import WORKER_DRAINED, ErrorInfo, QueueFull
from schemas.frames import (
    PROCEED,
    STOP,
    SUPERSEDED,
    AttemptDone,
    AttemptReturned,
    AttemptStarted,
    FrameKind,
    encode_first_frame,
    encode_frame,
)
from schemas.jobs import MAX_STARTS, Capability, Envelope, Limits

ACK_WAIT_S = 10.0
MIB = 1024 * 1024


class Bus:
    """Takes what a call says."""

    def __init__(self) -> None:
        self.removed: list[int] = []
        self.released: list[str] = []
        self.controlled: list[str] = []

    def delete_job(self, seq: int) -> None:
        self.removed.append(seq)

    def release(self, reply: str) -> None:
        self.released.append(reply)

    def send_control(self, worker: str, _message: bytes) -> None:
        self.controlled.append(worker)


def started(delivery: int, worker: str = "") -> bytes:
    """Return the payload of STARTED."""
    return AttemptStarted(worker=worker or f"w{delivery}", backend="b").model_dump_json().encode()


class Rig:
    """A call, and the frames of its workers."""

    def __init__(self, *, stream: bool = True, unread: UnreadBudget | None = None, **limits: float) -> None:
        self.bus = Bus()
        envelope = Envelope(
            job="job_1", request_id="req_1", endpoint="/", capability=Capability.CHAT, model="m", public_model="m",
            stream=stream, reply="reply", limits=Limits(**limits),
        )  # fmt: skip
        self.call = SyncRequest(self.bus, envelope, ACK_WAIT_S, unread)  # type: ignore[arg-type]
        self.shown = b""
        self.tokens: dict[int, str] = {}

    def hear(self, kind: FrameKind, delivery: int, seq: int, payload: bytes = b"") -> bytes | None:
        return self.call.on_event(encode_frame(kind, 1, delivery, seq, self.tokens.get(delivery, "lost"), payload))

    def start(self, delivery: int, worker: str = "") -> bytes | None:
        """Send STARTED of an attempt; an attempt of another worker at the same delivery has another token."""
        token = f"{delivery}-{worker}"
        answer = self.call.on_event(encode_frame(FrameKind.STARTED, 1, delivery, 0, token, started(delivery, worker)))
        if answer == PROCEED:
            self.tokens[delivery] = token
        return answer

    def first(
        self, kind: FrameKind, delivery: int, payload: bytes, *, elapsed_us: int = 0, token: str = ""
    ) -> bytes | None:
        """Send the first frame of an attempt that started without a request."""
        token = self.tokens[delivery] = token or f"{delivery}-"
        return self.call.on_event(
            encode_first_frame(kind, 1, delivery, 1, token, payload, started=started(delivery), elapsed_us=elapsed_us)
        )

    def chunk(self, delivery: int, seq: int, data: bytes) -> bytes | None:
        return self.hear(FrameKind.CHUNK, delivery, seq, data)

    def done(self, delivery: int, seq: int, tail: bytes = b"") -> bytes | None:
        return self.hear(FrameKind.DONE, delivery, seq, AttemptDone().model_dump_json().encode() + b"\n" + tail)

    def take(self) -> bytes:
        data = self.call.take_output()
        self.shown += data
        return data

    @property
    def code(self) -> str | None:
        return self.call.error.code if self.call.error else None


async def test_a_plain_answer() -> None:
    """Started, chunks, done: the bytes come in order, and the call ends without an error."""
    rig = Rig()
    rig.call.on_stored(7)
    assert rig.start(1) == PROCEED
    rig.chunk(1, 1, b"a")
    rig.chunk(1, 2, b"b")
    rig.done(1, 3, b"c")
    assert rig.take() == b"abc"
    assert (rig.call.state, rig.call.error, rig.call.worker) == (RequestState.ENDED, None, "w1")
    assert rig.bus.released == ["reply"]
    assert not rig.bus.removed


async def test_a_new_attempt_replaces_an_undelivered_one() -> None:
    """What a lost worker had said, and nobody saw, is forgotten when the next attempt begins."""
    rig = Rig(stream=False)
    rig.start(1)
    rig.chunk(1, 1, b"lost")
    assert rig.start(2) == PROCEED
    rig.chunk(2, 1, b"whole")
    rig.done(2, 2)
    assert rig.take() == b"whole"


async def test_a_partly_delivered_answer_is_never_restarted() -> None:
    """When bytes have gone out, a second attempt is told to stop, and the stream ends in an error."""
    rig = Rig()
    rig.start(1)
    rig.chunk(1, 1, b"seen")
    rig.take()
    assert rig.start(2) == STOP
    assert rig.code == "worker_lost"
    assert rig.take() == b""


async def test_a_resumed_worker_is_superseded() -> None:
    """Frames of an older delivery change nothing, and its questions are answered STALE."""
    rig = Rig(stream=False)
    rig.start(1)
    rig.start(2)
    rig.chunk(2, 1, b"new")
    assert rig.chunk(1, 1, b"old") == SUPERSEDED
    assert rig.start(1) == SUPERSEDED
    assert rig.done(1, 2, b"old") == SUPERSEDED
    rig.done(2, 2)
    assert rig.take() == b"new"


async def test_a_gap_is_an_error() -> None:
    """A lost frame is never skipped: the answer ends in an error and the worker is stopped."""
    rig = Rig()
    rig.start(1)
    rig.chunk(1, 2, b"second")
    assert rig.code == "events_lost"
    assert rig.bus.controlled == ["w1"]


async def test_a_lost_tail_is_noticed_by_the_heartbeat() -> None:
    """A heartbeat that counts more frames than came shows the loss."""
    rig = Rig()
    rig.start(1)
    assert rig.hear(FrameKind.HEARTBEAT, 1, 0) == PROCEED
    rig.hear(FrameKind.HEARTBEAT, 1, 1)
    assert rig.code == "events_lost"


async def test_a_failure_is_returned() -> None:
    """The worker's error is the caller's."""
    rig = Rig()
    rig.start(1)
    info = ErrorInfo(status=400, type="invalid_request_error", code="context_length_exceeded", message="too long")
    rig.hear(FrameKind.FAILED, 1, 1, info.model_dump_json().encode())
    assert rig.call.error == info


async def test_a_returned_job_waits_again_and_does_not_count() -> None:
    """A drained worker's job has not failed: it may be handed back any number of times."""
    rig = Rig()
    info = ErrorInfo(status=503, type="server_error", code=WORKER_DRAINED, message="drained").model_dump_json().encode()
    for delivery in range(1, MAX_STARTS + 4):
        assert rig.start(delivery) == PROCEED
        rig.hear(FrameKind.RETURNED, delivery, 1, info)
        assert rig.call.state is RequestState.QUEUED
    assert rig.call.starts == 0


def back(*, counted: bool, retry_after_s: float | None = None) -> bytes:
    info = ErrorInfo(status=503, type="t", code="backend_unavailable", message="busy", retry_after_s=retry_after_s)
    return AttemptReturned(**info.model_dump(), counted=counted).model_dump_json(exclude_none=True).encode()


async def test_the_third_attempt_that_fails_ends_the_request() -> None:
    """With what the backend said."""
    rig = Rig()
    for delivery in (1, 2, 3):
        assert rig.start(delivery) == PROCEED
        assert rig.code is None
        rig.hear(FrameKind.RETURNED, delivery, 1, back(counted=True))
    assert rig.code == "backend_unavailable"
    assert rig.start(4) == STOP


async def test_attempts_that_do_not_count_are_as_many_as_the_limit_on_waiting_allows() -> None:
    """They neither use up the tries nor begin the wait again."""
    rig = Rig(queue_s=100.0)
    queued_at = rig.call.queued_at
    for delivery in range(1, 50):
        assert rig.start(delivery) == PROCEED
        rig.hear(FrameKind.RETURNED, delivery, 1, back(counted=False, retry_after_s=2.0))
    assert (rig.call.state, rig.call.starts, rig.call.queued_at, rig.call.started_at) == (
        RequestState.QUEUED,
        0,
        queued_at,
        None,
    )
    assert rig.start(50) == PROCEED
    rig.hear(FrameKind.RETURNED, 50, 1, back(counted=True))
    assert (rig.code, rig.call.starts) == (None, 1)
    rig.call.check_deadlines(rig.call.queued_at + 101.0)
    assert rig.code == "queue_timeout"


async def test_a_pause_longer_than_the_queue_limit_ends_with_the_servers_error() -> None:
    """With `Retry-After`, and not as if no worker had taken the request."""
    rig = Rig(queue_s=3.0)
    assert rig.start(1) == PROCEED
    rig.hear(FrameKind.RETURNED, 1, 1, back(counted=False, retry_after_s=2.0))
    rig.call.check_deadlines(rig.call.queued_at + 2.9)
    assert rig.code is None
    rig.call.check_deadlines(rig.call.queued_at + 3.1)
    assert rig.call.error is not None
    assert (rig.call.error.status, rig.call.error.code, rig.call.error.headers()["retry-after"]) == (
        503,
        "backend_unavailable",
        "2",
    )


async def test_a_job_that_kills_its_workers_is_poison() -> None:
    """After three started attempts without an end, a fourth is not begun."""
    rig = Rig()
    for delivery in range(1, MAX_STARTS + 1):
        assert rig.start(delivery) == PROCEED
    assert rig.start(MAX_STARTS + 1) == STOP
    assert rig.code == "worker_lost"


async def test_a_disconnect_while_queued() -> None:
    """The job is deleted by its sequence, also when the sequence is learned only afterwards."""
    known, unknown = Rig(), Rig()
    known.call.on_stored(5)
    known.call.abandon()
    assert known.bus.removed == [5]
    unknown.call.abandon()
    assert not unknown.bus.removed
    assert unknown.start(1) == STOP
    unknown.call.on_stored(6)
    assert unknown.bus.removed == [6]
    assert unknown.bus.released == ["reply"]


async def test_a_disconnect_while_running() -> None:
    """The worker is told to stop."""
    rig = Rig()
    rig.call.on_stored(5)
    rig.start(1)
    rig.call.abandon()
    assert rig.bus.controlled == ["w1"]
    assert rig.start(2) == STOP


async def test_a_full_queue_is_the_callers_error() -> None:
    """A refused job ends the call with the refusal, and nothing is removed."""
    rig = Rig()
    rig.call.on_refused(QueueFull())
    assert (rig.call.state, rig.code) == (RequestState.ENDED, "queue_full")
    assert not rig.bus.removed


@pytest.mark.parametrize(
    ("running", "shown", "after_s", "code"),
    [
        (False, False, 6.0, "queue_timeout"),
        (True, False, ACK_WAIT_S + SILENCE_GRACE_S + 1, None),
        (True, True, ACK_WAIT_S + SILENCE_GRACE_S + 1, "worker_lost"),
    ],
)
async def test_nothing_waits_without_a_bound(*, running: bool, shown: bool, after_s: float, code: str | None) -> None:
    """Too long in the queue is an error; a silent worker is one only when its answer had begun to be shown."""
    rig = Rig(queue_s=5.0)
    if running:
        rig.start(1)
        rig.chunk(1, 1, b"x")
    if shown:
        rig.take()
    rig.call.check_deadlines(rig.call.last_event_at + after_s)
    assert rig.code == code
    assert (rig.call.state is RequestState.ENDED) == (code is not None)


async def test_a_slow_reader_is_bounded() -> None:
    """What waits for a caller who does not read is bounded; beyond it the stream ends in an error."""
    rig = Rig()
    rig.start(1)
    for seq in range(1, 12):
        rig.chunk(1, seq, b"x" * (MAX_UNREAD_BYTES // 8))
    assert rig.code == "slow_reader"


@pytest.mark.parametrize("done", [True, False])
async def test_a_stream_that_is_shed_is_not_complete(*, done: bool) -> None:
    """What waits for a caller counts among all that waits; where it is dropped, the stream ends in an error, the worker done or not."""
    budget = UnreadBudget(MIB)
    rig = Rig(unread=budget)
    rig.start(1)
    rig.chunk(1, 1, b"x" * (MIB // 2))
    assert budget.total == MIB // 2
    if done:
        rig.done(1, 2)
    other = Rig(unread=budget)
    other.start(1)
    other.chunk(1, 1, b"x" * (MIB // 2))
    assert other.take()
    assert budget.total == MIB // 2
    rig.call.shed()
    assert (rig.code, rig.take(), rig.call.state) == ("slow_reader", b"", RequestState.ENDED)
    assert budget.total == 0


async def test_invalid_frames_are_ignored() -> None:
    """Bytes that no worker sends are ignored."""
    rig = Rig()
    for junk in (b"", b"x", b"c 1\n", b"c one 1\nx", b"\xff\xfe"):
        assert rig.call.on_event(junk) is None
    assert rig.call.state is RequestState.QUEUED


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["start", "chunk", "skip", "done", "take"]), st.integers(1, 3)), max_size=40
)


@given(ACTIONS)
@settings(max_examples=200, deadline=None)
async def test_attempts_are_never_mixed(actions: list[tuple[str, int]]) -> None:
    """Whatever three workers say in whatever order: the caller sees one attempt's bytes, in order, from its first on."""
    rig = Rig()
    seq = dict.fromkeys((1, 2, 3), 0)
    for action, delivery in actions:
        if action == "start":
            seq[delivery] = 0
            rig.start(delivery)
        elif action == "take":
            rig.take()
        else:
            seq[delivery] += 2 if action == "skip" else 1
            text = b"%d:%d " % (delivery, seq[delivery])
            say: Any = rig.done if action == "done" else rig.chunk
            say(delivery, seq[delivery], text)
    rig.take()
    pieces = [tuple(map(int, piece.split(b":"))) for piece in rig.shown.split()]
    assert len({delivery for delivery, _ in pieces}) <= 1
    assert [number for _, number in pieces] == list(range(1, len(pieces) + 1))


async def test_a_first_frame_stands_for_the_start() -> None:
    """An answer in one frame names its worker, and the time of the start counts back from its arrival."""
    rig = Rig(stream=False)
    rig.call.submitted_at -= 10
    assert (
        rig.first(FrameKind.DONE, 1, AttemptDone().model_dump_json().encode() + b"\nwhole", elapsed_us=2_000_000)
        is None
    )
    assert (rig.call.state, rig.call.worker, rig.call.backend, rig.call.starts) == (RequestState.ENDED, "w1", "b", 1)
    assert rig.take() == b"whole"
    assert rig.call.started_at == pytest.approx(rig.call.last_event_at - 2, abs=0.5)


async def test_an_attempt_asks_after_its_first_frame() -> None:
    """A stream that still runs asks for its grant with the same token, and goes on."""
    rig = Rig()
    rig.first(FrameKind.CHUNK, 1, b"a")
    assert rig.start(1) == PROCEED
    rig.chunk(1, 2, b"b")
    assert rig.take() == b"ab"


async def test_another_attempt_of_the_same_delivery_is_dropped() -> None:
    """NATS was killed and forgot a delivery: frames of the second attempt are never mixed into those of the first."""
    rig = Rig()
    rig.first(FrameKind.CHUNK, 1, b"a")
    intruder = encode_first_frame(FrameKind.CHUNK, 1, 1, 1, "other", b"x", started=started(1, "other"), elapsed_us=0)
    assert rig.call.on_event(intruder) == SUPERSEDED
    assert rig.call.on_event(encode_frame(FrameKind.CHUNK, 1, 1, 2, "other", b"y")) == SUPERSEDED
    rig.chunk(1, 2, b"b")
    assert (rig.take(), rig.call.worker, rig.call.error) == (b"ab", "w1", None)


async def test_the_start_of_an_abandoned_request_is_refused() -> None:
    """A caller has disconnected before the worker was known: the worker is told so when it asks."""
    rig = Rig()
    rig.call.on_stored(7)
    rig.call.abandon()
    assert rig.first(FrameKind.CHUNK, 1, b"late") == STOP
    assert rig.start(1) == STOP
    assert not rig.take()


async def test_frames_of_an_earlier_worker_are_read() -> None:
    """During an upgrade a worker may still send heads without run and token; another worker is fenced by its name."""
    rig = Rig()
    assert rig.call.on_event(b"s 1 0\n" + started(1)) == PROCEED
    assert rig.call.on_event(b"s 1 0\n" + started(1, "other")) == SUPERSEDED
    rig.call.on_event(b"c 1 1\na")
    rig.call.on_event(b"d 1 2\n{}\nb")
    assert (rig.take(), rig.call.error, rig.call.worker) == (b"ab", None, "w1")


@pytest.mark.parametrize("head", [b"d 1 1 1 t 0 5", b"d 1 1 1 t 99 5", b"d 1 1 1 t 2 -5", b"d 1 1 1 t 2", b"d 1 1 1"])
async def test_a_malformed_head_is_no_frame(head: bytes) -> None:
    """A head with a wrong size, time or count of fields is ignored, and nothing is raised into the connection."""
    rig = Rig()
    assert rig.call.on_event(head + b"\n{}rest") is None
    assert rig.call.state is RequestState.QUEUED
