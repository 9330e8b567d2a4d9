"""The frames and the requests of an attempt at a direct job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from backbone.testing.blobs import MemoryBlobStore
from schemas.frames import PROCEED, FrameKind, decode_frame
from schemas.job_events import GateReply, GateVerdict
from schemas.jobs import Capability, Envelope, Lane
from workers.backends.base import Finish
from workers.outbox import MAX_REQUESTS, JobLost
from workers.reply_outbox import ReplyOutbox
from workers.worker_context import WorkerContext


@dataclass
class Job:
    """A delivery of a job."""

    fresh: bool = True
    owned: bool = True
    delivery: int = 1

    def ack(self) -> None:
        """Every attempt that ends acknowledges."""


@dataclass
class Bus:
    """The worker's bus: `answer` answers the last request."""

    sent: list[bytes] = field(default_factory=list)
    may_wait: list[bool] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    answer: Callable[[bytes | None], None] = lambda _: None

    def send_event(self, _reply: str, frame: bytes, *, may_wait: bool) -> None:
        self.sent.append(frame)
        self.may_wait.append(may_wait)

    def request(self, _reply: str, frame: bytes, on_answer: Callable[[bytes | None], None]) -> int:
        self.requests.append(frame)
        self.answer = on_answer
        return len(self.requests)

    def cancel_request(self, _ticket: int) -> None:
        self.answer = lambda _: None


class Desk:
    """One outbox, what it sent, and the replies that its attempt got."""

    def __init__(self, *, fresh: bool = True) -> None:
        self.bus, self.job = Bus(), Job(fresh)
        envelope = Envelope(
            job="job_1", request_id="req", endpoint="/", capability=Capability.CHAT, lane=Lane.DEFAULT, model="m",
            public_model="m", stream=True, reply="nexus.reply.g.t", owner="o",
        )  # fmt: skip
        self.outbox = ReplyOutbox(
            cast("Any", self.bus), MemoryBlobStore(), WorkerContext("w", "b"), cast("Any", self.job), envelope
        )
        self.replies: list[GateReply | None] = []

    def ask(self, answer: bytes | None) -> GateReply | None:
        self.outbox.request(FrameKind.HEARTBEAT, self.replies.append)
        self.bus.answer(answer)
        return self.replies[-1]


def test_an_attempt_whose_job_is_lost_sends_nothing() -> None:
    """Neither output nor an end: the job is another worker's."""
    desk = Desk()
    desk.job.owned = False
    with pytest.raises(JobLost):
        desk.outbox.take(b"late")
    assert desk.bus.sent == []


def test_a_fresh_attempt_without_a_grant_waits_when_its_gateway_is_silent() -> None:
    """The gateway may only be reconnecting: the job goes back to its queue, and no output is lost."""
    assert Desk().ask(None) == GateReply(kind=GateVerdict.WAIT)


@pytest.mark.parametrize("started", ["granted", "output", "stale"])
def test_an_attempt_that_may_be_wanted_asks_again(started: str) -> None:
    """After a grant, after output, and where it waits for the grant: until the gateway counts as dead."""
    desk = Desk(fresh=started != "stale")
    if started == "granted":
        assert desk.ask(PROCEED) == GateReply(kind=GateVerdict.PROCEED)
    elif started == "output":
        desk.outbox.take(b"a")
    answers = [desk.ask(None) for _ in range(MAX_REQUESTS)]
    assert answers == [None] * (MAX_REQUESTS - 1) + [GateReply(kind=GateVerdict.STOP)]


async def test_neither_the_first_token_nor_the_end_waits_for_other_messages() -> None:
    """The tokens in between may: a caller notices when an answer begins and when it ends."""
    desk = Desk()
    for tokens in (0, 1, 1, 2):
        desk.outbox.tokens += tokens
        desk.outbox.take(b"data")
    await desk.outbox.complete(Finish())
    assert [decode_frame(frame).kind for frame in desk.bus.sent] == [*[FrameKind.CHUNK] * 4, FrameKind.DONE]
    assert desk.bus.may_wait == [False, False, True, True, False]


def test_a_heartbeat_before_the_grant_is_a_start() -> None:
    """The gateway does not know the attempt yet; afterwards it is asked about the last frame it got."""
    desk = Desk()
    desk.ask(PROCEED)
    desk.outbox.take(b"a")
    desk.ask(PROCEED)
    frames = [decode_frame(frame) for frame in desk.bus.requests]
    assert [(frame.kind, frame.seq) for frame in frames] == [(FrameKind.STARTED, 0), (FrameKind.HEARTBEAT, 1)]
