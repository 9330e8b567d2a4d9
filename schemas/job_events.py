"""Define the events of durable jobs, and the messages between workers and the attempt gate.

Events are frames on `nexus.events.<job>`, kept in the order in which they were stored.
A frame is as `schemas.frames` describes; `token` is random and proves that its sender was given the job.
A reader believes one attempt at a time: a later STARTED replaces the earlier attempt, whatever its numbers, and events of
other attempts are dropped. A frame may be stored twice, when its acknowledgment was lost: the second copy is dropped. A missing
`seq` may still arrive; if it is missing after the job has ended, that is an error.

| kind | payload |
|---|---|
| QUEUED | JSON `JobRecord`, by the gateway: the record at its creation. Its delivery and seq are 0, its token `-` |
| STARTED | JSON `AttemptStarted` |
| CHUNK | bytes of the answer: of a stream of server-sent events exactly one frame, `data: …` with its blank line |
| BLOB | JSON `BlobRef`: the same bytes, when they are too large for a message |
| PROGRESS | JSON `Progress` |
| ADAPTED | JSON `AdaptedParameters` |
| RETURNED | JSON `AttemptReturned`: the job went back to the queue |
| SEALED | of a sealed job: one of CHUNK, BLOB, PROGRESS and ADAPTED, encrypted (`backbone.bus.content_seals`) |

The end of a job is its outcome (`schemas.outcome`), not an event.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from schemas.frames import FrameKind, Progress
from schemas.names import SubjectToken

QUEUED = "q"
NO_TOKEN = "-"


class GateRequest(BaseModel):
    """A worker's request to the attempt gate, on `nexus.ask.<job>`. Any gateway may reply.

    `kind` is FrameKind's STARTED (the attempt asks for its start grant), HEARTBEAT (the attempt asks whether it is still valid) or
    RETURNED (a notification without a reply).
    """

    model_config = ConfigDict(frozen=True)

    kind: FrameKind
    job: SubjectToken
    run: int
    delivery: int
    token: str
    owner: str
    key: str = ""
    """The id of the API key whose limits the job counts against."""
    worker: SubjectToken
    backend: str = ""
    progress: Progress | None = None
    """The newest progress, without its preview."""
    sealed: bool = False
    """For STARTED: the job is sealed, and the reply must hold its content key."""
    counted: bool = True
    """For RETURNED: the attempt counts as failed."""
    code: str = Field("", max_length=100)
    """For RETURNED: the code of the error."""


class GateVerdict(StrEnum):
    """The decision of the attempt gate."""

    PROCEED = "+"
    STOP = "-"
    """The job has an outcome: stop the attempt and delete the message."""
    SUPERSEDED = "!"
    """Another attempt has begun: stop this one and leave the job to the other."""
    WAIT = "w"
    """The attempt may not start now: return the job to its queue for `delay_s`."""
    EXHAUSTED = "x"
    """The job was started too often: end it with `error` and store a dead letter."""


class GateReply(BaseModel):
    """The attempt gate's reply."""

    model_config = ConfigDict(frozen=True)

    kind: GateVerdict
    attempt: int = 1
    """For PROCEED: the number of this attempt in its run, from 1, without those that a worker returned because it shut down. For EXHAUSTED: the
    number of the last attempt.
    """
    delay_s: float = 0.0
    key: str = ""
    """For PROCEED of a sealed job: its content key (`backbone.bus.content_seals`)."""
    error: dict[str, object] | None = None
    """For EXHAUSTED: a `schemas.errors.ErrorInfo`."""


_VERDICTS = {verdict.value.encode(): GateReply(kind=verdict) for verdict in GateVerdict}


def decode_reply(data: bytes) -> GateReply | None:
    """Decode a gateway's reply to a request: JSON `GateReply`, or the verdict alone. Return None for anything else."""
    try:
        return _VERDICTS.get(data) or GateReply.model_validate_json(data)
    except ValueError:
        return None


class JobEventKind(StrEnum):
    """The names of events as callers receive them."""

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
        """Parse the text form of an id. Raises ValueError."""
        run, delivery, seq = text.split("-")
        return cls(int(run), int(delivery), int(seq))
