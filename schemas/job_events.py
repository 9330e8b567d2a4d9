"""Events of durable jobs: frames on `nexus.events.<job>`, kept in the order in which they were stored.

A frame is `<kind> <run> <delivery> <seq> <token>` + newline + payload. `run` counts retries and replays, `delivery`
counts NATS's deliveries, `seq` the events of one attempt from 0 (its STARTED); `token` is the attempt's own random name.
A reader believes one attempt at a time: a later STARTED replaces the earlier attempt, whatever its numbers, and what other
attempts say is dropped. A frame may be stored twice (its acknowledgement was lost): the second copy is dropped. A `seq` that is
missing may still come; when the job has ended and it has not, that is an error.

| kind | payload |
|---|---|
| QUEUED | JSON `JobRecord`, by the gateway: what the record began as. Its delivery and seq are 0, its token `-` |
| STARTED | JSON `Started` |
| CHUNK | bytes of the answer: of a stream of server-sent events exactly one frame, `data: …` with its blank line |
| BLOB | JSON `BlobRef`: the same, where it is too large for a message |
| PROGRESS | JSON `Progress` |
| ADAPTED | JSON `AdaptedParameters` |
| RETURNED | JSON `Returned`: the job went back to the queue |

How a job ended is its terminal word (`schemas.outcome`), not an event.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from schemas.frames import FrameKind, Progress
from schemas.names import SubjectToken

QUEUED = "q"
NO_TOKEN = "-"


class DurableFrame(NamedTuple):
    """A decoded event."""

    kind: str
    """`QUEUED` or one of EventKind's letters."""
    run: int
    delivery: int
    seq: int
    token: str
    payload: bytes

    @property
    def id(self) -> str:
        """What callers know the event by."""
        return f"{self.run}-{self.delivery}-{self.seq}"


def encode_durable_frame(kind: str, run: int, delivery: int, seq: int, token: str, payload: bytes = b"") -> bytes:
    """The wire form of one event."""
    return b"%b %d %d %d %b\n%b" % (kind.encode(), run, delivery, seq, token.encode(), payload)


def decode_durable_frame(data: bytes) -> DurableFrame:
    """Inverse of `encode_durable_frame`. Raises ValueError when `data` is no such frame."""
    head, newline, payload = data.partition(b"\n")
    if not newline:
        raise ValueError("not an event frame")
    kind, run, delivery, seq, token = head.split(b" ")
    return DurableFrame(kind.decode(), int(run), int(delivery), int(seq), token.decode(), payload)


class GateRequest(BaseModel):
    """What a worker asks the gateways about a durable job, on `nexus.ask.<job>`; any one of them answers.

    `kind` is EventKind's STARTED (may I begin?), BEAT (does it still stand?) or RETURNED (told, not asked).
    """

    model_config = ConfigDict(frozen=True)

    kind: FrameKind
    job: SubjectToken
    run: int
    delivery: int
    token: str
    owner: str
    key: str = ""
    """The id of the API key that the job counts against."""
    worker: SubjectToken
    backend: str = ""
    progress: Progress | None = None
    """The newest, without its preview."""
    counted: bool = True
    """Of RETURNED: the attempt counts as a failed one."""


class GateVerdict(StrEnum):
    """The gateway's word."""

    PROCEED = "+"
    STOP = "-"
    """The job is decided: stop, and forget it."""
    SUPERSEDED = "!"
    """Another attempt has begun: stop, and leave the job to it."""
    WAIT = "w"
    """Not now: give it back, for `delay_s`."""
    EXHAUSTED = "x"
    """It was started too often: end it with `error`, among the dead letters."""


class GateReply(BaseModel):
    """What a gateway answers."""

    model_config = ConfigDict(frozen=True)

    kind: GateVerdict
    attempt: int = 1
    """Of PROCEED: which attempt of this run this is, from 1; those handed back by a worker that shut down do not count. Of EXHAUSTED: the
    last one.
    """
    delay_s: float = 0.0
    error: dict[str, object] | None = None
    """Of EXHAUSTED: a `schemas.errors.ErrorInfo`."""


class JobEventKind(StrEnum):
    """The names of events as callers get them."""

    QUEUED = "job.queued"
    STARTED = "job.started"
    RESTARTED = "job.restarted"
    PROGRESS = "job.progress"
    ADAPTED = "job.adapted"
    CHUNK = "job.chunk"
    COMPLETED = "job.completed"
    FAILED = "job.failed"
    CANCELLED = "job.cancelled"
    EXPIRED = "job.expired"


class EventId(NamedTuple):
    """`<run>-<delivery>-<seq>`, compared in that order."""

    run: int
    delivery: int
    seq: int

    @classmethod
    def parse(cls, text: str) -> EventId:
        """Raises ValueError."""
        run, delivery, seq = text.split("-")
        return cls(int(run), int(delivery), int(seq))
