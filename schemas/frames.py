"""What a worker says about a job while it runs, on the job's reply subject.

A frame is one NATS message: `<kind> <delivery> <seq>` + newline + payload. `delivery` counts NATS's deliveries of
the job, `seq` counts the frames of one delivery from 0. A reader takes only the newest delivery and treats a gap in
`seq` as an error: nothing is skipped silently, and two attempts are never mixed.

| kind | payload | takes a seq |
|---|---|---|
| STARTED  | JSON `AttemptStarted`; sent as a request: the answer is PROCEED, STOP or SUPERSEDED | 0 |
| CHUNK    | bytes for the caller, in the endpoint's own form; may join several tokens | yes |
| BLOB     | JSON `BlobRef`: more bytes for the caller, in the place of a CHUNK too large to be one | yes |
| PROGRESS | JSON `Progress`: how far the backend is | yes |
| HEARTBEAT | empty: the attempt lives though it has nothing to say; a question like STARTED | repeats the last seq |
| ADAPTED  | JSON `AdaptedParameters`: what of the request was replaced by its nearest equivalent; before the first bytes of a stream | yes |
| DONE     | JSON `AttemptDone`, newline, the last bytes for the caller (may be empty) | yes |
| FAILED   | JSON `ErrorInfo`: final for this run | yes |
| RETURNED | JSON `AttemptReturned`: the job went back to the queue; another attempt follows | yes |
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from schemas.errors import ErrorInfo
from schemas.jobs import Usage
from schemas.names import SubjectToken


class FrameKind(StrEnum):
    """The first letter of a frame."""

    STARTED = "s"
    CHUNK = "c"
    BLOB = "r"
    PROGRESS = "p"
    ADAPTED = "a"
    HEARTBEAT = "h"
    DONE = "d"
    FAILED = "f"
    RETURNED = "b"


PROCEED = b"+"
"""The caller is there: run."""
STOP = b"-"
"""The caller is gone, or the job has been decided: stop, and forget the job."""
SUPERSEDED = b"!"
"""A newer delivery of this job has begun: stop, and leave the job to it."""


class AttemptStarted(BaseModel):
    """A worker has begun an attempt."""

    model_config = ConfigDict(frozen=True)

    worker: SubjectToken
    backend: str


class AttemptReturned(ErrorInfo):
    """Why an attempt gave its job back."""

    counted: bool = True
    """The attempt counts as a failed one. False: the server saw nothing of the request, or asked to wait."""


class AdaptedParameters(BaseModel):
    """Parameters of a request that the worker replaced by their nearest equivalent. A later one replaces an earlier one."""

    model_config = ConfigDict(frozen=True)

    parameters: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")], ...] = Field(max_length=40)
    """They go into a header: a worker may name fields, and nothing else."""


class BlobRef(BaseModel):
    """Bytes that travel by reference."""

    model_config = ConfigDict(frozen=True)

    name: str
    size: int


LOADING_PHASE = "load"


class Progress(BaseModel):
    """How far the backend is, where it says."""

    model_config = ConfigDict(frozen=True)

    phase: str = "run"
    """`LOADING_PHASE` while the backend loads the model, `queued` while the job waits within the backend, `run` while it works."""
    fraction: float | None = None
    """0 to 1."""
    step: int | None = None
    steps: int | None = None
    message: str | None = None
    preview: str | None = None
    """A small picture of what there is so far, as a data URL of at most `MAX_PREVIEW` characters."""


MAX_PREVIEW = 128 * 1024


class AttemptDone(BaseModel):
    """An attempt ended well."""

    model_config = ConfigDict(frozen=True)

    content_type: str = "application/json"
    usage: Usage | None = None
    tokens: int = 0
    """Pieces of output that the backend sent: tokens, for text."""
    blob: BlobRef | None = None
    """The whole answer, where it is too large to travel in events. No bytes came before it then."""


class Frame(NamedTuple):
    """A decoded event."""

    kind: str
    delivery: int
    seq: int
    payload: bytes


def encode_frame(kind: str, delivery: int, seq: int, payload: bytes = b"") -> bytes:
    """The wire form of one event."""
    return b"%b %d %d\n%b" % (kind.encode(), delivery, seq, payload)


def decode_frame(data: bytes) -> Frame:
    """Inverse of `encode_frame`. Raises ValueError when `data` is not a frame."""
    head, newline, payload = data.partition(b"\n")
    if not newline:
        raise ValueError("not an event frame")
    kind, delivery, seq = head.split(b" ")
    return Frame(kind.decode(), int(delivery), int(seq), payload)
