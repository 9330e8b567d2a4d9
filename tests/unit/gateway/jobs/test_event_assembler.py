"""The assembler of events: a caller that resumes anywhere receives exactly the events it would have received."""

from __future__ import annotations

from dataclasses import dataclass

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.jobs.api import EventsExpired
from gateway.jobs.event_stream import BEFORE_FIRST, MAX_PENDING_FRAMES, AssembledEvent, EventAssembler
from schemas.errors import Unavailable
from schemas.frames import AttemptStarted, Frame, FrameKind
from schemas.job_events import NO_TOKEN, QUEUED, EventId, JobEventKind

BEGINS = {JobEventKind.STARTED, JobEventKind.RESTARTED}
BACK = Unavailable("given back").info.model_dump_json().encode()
OUTPUT = (FrameKind.CHUNK, FrameKind.BLOB, FrameKind.PROGRESS, FrameKind.RETURNED)


@dataclass(frozen=True)
class Attempt:
    """The frames of one attempt, in the order of its worker."""

    run: int
    delivery: int
    token: str
    kinds: tuple[FrameKind, ...] = ()

    def frames(self) -> list[Frame]:
        started = AttemptStarted(worker=self.token, backend="b").model_dump_json().encode()
        frames = [Frame(FrameKind.STARTED, self.run, self.delivery, 0, self.token, started)]
        for seq, kind in enumerate(self.kinds, 1):
            payload = BACK if kind is FrameKind.RETURNED else b"%b.%d" % (self.token.encode(), seq)
            frames.append(Frame(kind, self.run, self.delivery, seq, self.token, payload))
        return frames


def attempt(token: str, chunks: int, run: int = 1, delivery: int = 1) -> Attempt:
    return Attempt(run, delivery, token, (FrameKind.CHUNK,) * chunks)


def queued(run: int = 1) -> Frame:
    return Frame(QUEUED, run, 0, 0, NO_TOKEN, b"record %d" % run)


def read(stream: list[Frame], after: EventId = BEFORE_FIRST) -> tuple[list[AssembledEvent], EventAssembler]:
    """Return all events for a caller that received everything up to `after`. Raises EventsExpired."""
    assembly = EventAssembler(after)
    return [*feed(assembly, stream), *assembly.close_stored()], assembly


def feed(assembly: EventAssembler, stream: list[Frame]) -> list[AssembledEvent]:
    return [piece for frame in stream for piece in assembly.add(frame)]


def answer(pieces: list[AssembledEvent]) -> list[bytes]:
    """Return what the caller has in the end: the output of an attempt is void when the next one, or the next run, begins."""
    held: list[bytes] = []
    for piece in pieces:
        if piece.kind in {*BEGINS, JobEventKind.QUEUED}:
            held = []
        elif piece.kind is JobEventKind.CHUNK:
            held.append(piece.data)
    return held


def expected(stream: list[Frame]) -> list[tuple[JobEventKind, EventId]]:
    """The same by another way: cut at each first STARTED; of each attempt, what was stored until the next, without gaps."""
    told: list[tuple[JobEventKind, EventId]] = []
    begins: list[int] = []
    for at, frame in enumerate(stream):
        known = {stream[begin].token for begin in begins}
        if frame.kind == FrameKind.STARTED and frame.token not in known:
            begins.append(at)
    marks = [at for at, frame in enumerate(stream) if frame.kind == QUEUED]
    for at in sorted([*begins, *marks]):
        frame = stream[at]
        if frame.kind == QUEUED:
            if all(stream[other].run < frame.run for other in [*begins, *marks] if other < at):
                told.append((JobEventKind.QUEUED, EventId(frame.run, 0, 0)))
            continue
        restarted = frame.run > 1 or at != begins[0]
        told.append((JobEventKind.RESTARTED if restarted else JobEventKind.STARTED, EventId(*frame[1:4])))
        ends = [other for other in begins if other > at] + [other for other in marks if stream[other].run > frame.run]
        end = min(ends, default=len(stream))
        stored = {f.seq: f for f in stream[:end] if f.token == frame.token}
        seq = 1
        while seq in stored:
            kind = stored[seq].kind
            if kind == FrameKind.PROGRESS:
                told.append((JobEventKind.PROGRESS, EventId(*stored[seq][1:4])))
            elif kind in {FrameKind.CHUNK, FrameKind.BLOB}:
                told.append((JobEventKind.CHUNK, EventId(*stored[seq][1:4])))
            seq += 1
    return told


@st.composite
def streams(draw: st.DrawFn, *, forgetful: bool = False) -> list[Frame]:
    """Generate streams as NATS may store them: several runs, with duplicate, late and reordered frames."""
    stream: list[Frame] = []
    tokens = iter("abcdefghijkl")
    late: list[Frame] = []
    for run in range(1, draw(st.integers(1, 3)) + 1):
        if draw(st.integers(0, 9)):  # the first event may be lost
            stream.append(queued(run))
        delivery = 0
        for _ in range(draw(st.integers(0, 3))):
            delivery = draw(st.integers(1, delivery + 1)) if forgetful else delivery + draw(st.integers(1, 2))
            kinds = draw(st.lists(st.sampled_from(OUTPUT), max_size=6))
            frames = Attempt(run, delivery, next(tokens), tuple(kinds)).frames()
            lost_at = draw(st.integers(0, 3))  # the worker's end: what it said last is not stored, or late
            kept, rest = (frames[:-1], frames[-1:]) if lost_at == 1 and len(frames) > 1 else (frames, [])
            for at in range(len(kept) - 1):
                if not draw(st.integers(0, 4)):
                    kept[at], kept[at + 1] = kept[at + 1], kept[at]
            for frame in kept:
                stream.append(frame)
                if not draw(st.integers(0, 4)):
                    stream.insert(draw(st.integers(stream.index(frame), len(stream))), frame)
            stream += late
            late = rest
    return stream


@settings(max_examples=100, deadline=None)
@given(streams(forgetful=True))
def test_each_event_is_returned_once_in_order_and_attempts_are_never_mixed(stream: list[Frame]) -> None:
    """Whatever was stored twice, late or in the wrong order."""
    pieces, _ = read(stream)
    assert [(piece.kind, piece.id) for piece in pieces] == expected(stream)
    begun = ""
    for piece in pieces:
        if piece.kind in BEGINS:
            begun = orjson.loads(piece.data)["worker"]
        elif piece.kind in {JobEventKind.CHUNK, JobEventKind.PROGRESS}:
            assert piece.data.startswith(begun.encode() + b".")


@settings(max_examples=100, deadline=None)
@given(streams())
def test_a_stream_resumed_anywhere_returns_the_remaining_events(stream: list[Frame]) -> None:
    """No event is repeated or missing, whether the caller stopped during the job or at its end."""
    whole, _ = read(stream)
    assert [piece.id for piece in whole] == sorted({piece.id for piece in whole})
    for had in range(len(whole) + 1):
        rest, _ = read(stream, whole[had - 1].id if had else BEFORE_FIRST)
        assert rest == whole[had:]


@settings(max_examples=100, deadline=None)
@given(streams(), st.data())
def test_a_stream_resumed_during_the_job_returns_the_remaining_events(stream: list[Frame], data: st.DataObject) -> None:
    """The first part was read when less was stored."""
    early = stream[: data.draw(st.integers(0, len(stream)))]
    had = feed(EventAssembler(), early)
    rest, _ = read(stream, had[-1].id if had else BEFORE_FIRST)
    assert had + rest == read(stream)[0]


@settings(max_examples=100, deadline=None)
@given(streams(forgetful=True))
def test_a_lost_delivery_count_mixes_no_attempts(stream: list[Frame]) -> None:
    """Ids may then repeat. A resuming caller may receive events again after a RESTARTED; its answer is complete."""
    whole, _ = read(stream)
    for had in range(len(whole) + 1):
        rest, _ = read(stream, whole[had - 1].id if had else BEFORE_FIRST)
        assert answer(whole[:had] + rest) == answer(whole)


@settings(max_examples=100, deadline=None)
@given(streams(forgetful=True), st.data())
def test_a_complete_job_returns_the_attempt_that_ended_it(stream: list[Frame], data: st.DataObject) -> None:
    """Whatever ran beside it, a resuming caller receives that attempt's answer or learns that it is incomplete."""
    tokens = sorted({frame.token for frame in stream if frame.kind == FrameKind.STARTED})
    if not tokens:
        return
    winner = data.draw(st.sampled_from(tokens))
    frames = {frame.seq: frame for frame in stream if frame.token == winner}
    events = max(frames) + 1
    early = feed(EventAssembler(), stream[: data.draw(st.integers(0, len(stream)))])
    had = early[: data.draw(st.integers(0, len(early)))]
    assembly = EventAssembler(had[-1].id if had else BEFORE_FIRST, only_token=winner)
    told = had + feed(assembly, stream)
    if not assembly.is_complete(winner, events):  # it is told from its beginning
        assembly = EventAssembler(only_token=winner, restarted=True)
        told += feed(assembly, stream)
    assert assembly.is_complete(winner, events) == (len(frames) == events)
    if len(frames) == events:
        shown = [frames[seq] for seq in sorted(frames) if frames[seq].kind in {FrameKind.CHUNK, FrameKind.BLOB}]
        assert answer(told) == [frame.payload for frame in shown]


@settings(max_examples=100, deadline=None)
@given(streams(), st.data())
def test_deleted_events_are_never_skipped_silently(stream: list[Frame], data: st.DataObject) -> None:
    """The oldest events are deleted first. A caller that received them continues; any other gets an error."""
    whole, assembly = read(stream)
    newest = assembly._token
    told = data.draw(st.integers(0, len(whole)))
    kept = stream[data.draw(st.integers(0, len(stream))) :]
    try:
        rest, resumed = read(kept, whole[told - 1].id if told else BEFORE_FIRST)
    except EventsExpired:
        return
    if resumed.is_complete(newest, assembly._next):
        assert answer(whole[:told] + rest) == answer(whole)


class TestExpiry:
    """The first events of a job have been deleted."""

    tail = attempt("a", 5).frames()[3:]
    """Its chunks 3, 4 and 5."""

    def test_a_new_caller_gets_an_error(self) -> None:
        with pytest.raises(EventsExpired) as caught:
            read(self.tail)
        assert (caught.value.info.status, caught.value.info.code) == (410, "events_expired")

    @pytest.mark.parametrize("after", [EventId(1, 0, 0), EventId(1, 1, 1), EventId(1, 2, 4), EventId(2, 1, 4)])
    def test_a_caller_that_lacks_events_gets_an_error(self, after: EventId) -> None:
        with pytest.raises(EventsExpired):
            read(self.tail, after)

    @pytest.mark.parametrize(("had", "left"), [(2, 3), (3, 2), (5, 0)])
    def test_a_caller_that_received_the_missing_events_continues(self, had: int, left: int) -> None:
        pieces, assembly = read(self.tail, EventId(1, 1, had))
        assert [piece.data for piece in pieces] == [b"a.3", b"a.4", b"a.5"][3 - left :]
        assert assembly.is_complete("a", 6)

    def test_a_new_attempt_makes_up_for_it(self) -> None:
        """The missing events are void, and a caller that received some of them gets a restart."""
        stream = [*self.tail, *attempt("b", 1, delivery=2).frames()]
        fresh, _ = read(stream)
        restarted, _ = read(stream, EventId(1, 1, 2))
        assert [piece.kind for piece in fresh] == [JobEventKind.STARTED, JobEventKind.CHUNK]
        assert [piece.kind for piece in restarted] == [JobEventKind.RESTARTED, JobEventKind.CHUNK]

    def test_without_stored_events_there_are_none(self) -> None:
        """The end of the job then shows that it is not whole."""
        pieces, assembly = read([])
        assert pieces == []
        assert not assembly.is_complete("a", 6)


def test_a_job_without_its_first_event_is_complete() -> None:
    """A gateway that died right after it stored the job had no time for it."""
    pieces, assembly = read(attempt("a", 2).frames())
    assert [piece.kind for piece in pieces] == [JobEventKind.STARTED, JobEventKind.CHUNK, JobEventKind.CHUNK]
    assert assembly.is_complete("a", 3)


def test_a_late_first_event_is_ignored() -> None:
    """The worker was faster than the gateway, so QUEUED would contradict the running attempt."""
    frames = attempt("a", 2).frames()
    pieces, _ = read([*frames[:2], queued(), *frames[2:]])
    assert [piece.kind for piece in pieces] == [JobEventKind.STARTED, JobEventKind.CHUNK, JobEventKind.CHUNK]


def test_a_stream_with_a_gap_is_not_complete() -> None:
    """Events after a gap are held back until the missing frame arrives."""
    start, one, two, three = attempt("a", 3).frames()
    assembly = EventAssembler()
    assert [piece.data for piece in feed(assembly, [queued(), start, one, three])][2:] == [b"a.1"]
    assert not assembly.is_complete("a", 4)
    assert [piece.data for piece in assembly.add(two)] == [b"a.2", b"a.3"]
    assert assembly.is_complete("a", 4)
    assert not assembly.is_complete("b", 4)


def test_a_gap_before_many_frames_is_closed() -> None:
    """What waits has a bound; the one that it waits for has not."""
    start, one, *rest = attempt("a", MAX_PENDING_FRAMES + 10).frames()
    assembly = EventAssembler()
    feed(assembly, [start, *rest])
    assert len(assembly.add(one)) == MAX_PENDING_FRAMES + 1


@pytest.mark.parametrize("first", [1, 2, 7])
def test_the_terminal_event_comes_last(first: int) -> None:
    """Its id may be resumed from like any other."""
    pieces, assembly = read([queued(), *attempt("a", 3, delivery=first).frames()])
    assert assembly.end_id() > pieces[-1].id
    for waiting in ([], [queued()], [queued(), *attempt("a", 3).frames(), queued(2)]):
        pieces, assembly = read(waiting)
        assert assembly.end_id() > (pieces[-1].id if pieces else BEFORE_FIRST)


def test_events_by_reference_are_marked() -> None:
    frames = Attempt(1, 1, "a", (FrameKind.CHUNK, FrameKind.BLOB)).frames()
    assert [piece.by_ref for piece in read(frames)[0]] == [False, False, True]
