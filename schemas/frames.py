"""Define what a worker sends about a synchronous job while it runs, on the job's reply subject.

A frame is one NATS message: `<kind> <run> <delivery> <seq> <token>` + newline + payload. `run` counts retries and replays,
`delivery` counts NATS's deliveries of the job, `seq` counts the frames of one attempt from 0, `token` is the attempt's own name.
A reader believes one attempt at a time and treats a gap in `seq` as an error: no frame is skipped silently, and two attempts are
never mixed. The events of durable jobs (`schemas.job_events`) have the same form.

The first frame of an attempt may stand for its STARTED: `<kind> … <token> <size> <elapsed_us>` + newline + `size` bytes of
`AttemptStarted` + payload. Most attempts end so soon that a STARTED of their own would be half of their messages.

| kind | payload | takes a seq |
|---|---|---|
| STARTED  | JSON `AttemptStarted`; sent as a request by an attempt that still runs after a moment, or that may not start without the reply: PROCEED, STOP or SUPERSEDED | 0 |
| CHUNK    | bytes for the caller, in the endpoint's own form; may join several tokens | yes |
| BLOB     | JSON `BlobRef`: bytes for the caller that are too large for a CHUNK | yes |
| PROGRESS | JSON `Progress`: how far the backend is | yes |
| HEARTBEAT | empty: the attempt lives but has no output; a request like STARTED | repeats the last seq |
| ADAPTED  | JSON `AdaptedParameters`: the parameters that were replaced by their nearest equivalent; before the first bytes of a stream | yes |
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
from schemas.usage import MediaUsage


class FrameKind(StrEnum):
    """The kind of a frame: its first letter."""

    STARTED = "s"
    CHUNK = "c"
    BLOB = "r"
    PROGRESS = "p"
    ADAPTED = "a"
    HEARTBEAT = "h"
    DONE = "d"
    FAILED = "f"
    RETURNED = "b"
    SEALED = "x"
    """An event of a durable job whose kind and payload are encrypted (`backbone.bus.content_seals`)."""


PROCEED = b"+"
"""The caller waits for the answer: run the job."""
STOP = b"-"
"""The caller has disconnected, or the job has an outcome: stop the attempt and delete the job."""
SUPERSEDED = b"!"
"""A newer delivery of this job has begun: stop the attempt and leave the job to the newer one."""


class AttemptStarted(BaseModel):
    """A worker has begun an attempt."""

    model_config = ConfigDict(frozen=True)

    worker: SubjectToken
    backend: str


class AttemptReturned(ErrorInfo):
    """A worker has returned the job to its queue, for this reason."""

    counted: bool = True
    """The attempt counts as failed. False: the server received no part of the request, or asked the worker to wait."""


class AdaptedParameters(BaseModel):
    """The parameters of a request that the worker replaced by their nearest equivalent. A later frame replaces an earlier one."""

    model_config = ConfigDict(frozen=True)

    parameters: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")], ...] = Field(max_length=40)
    """They become a header, so that only names of fields are allowed."""


class BlobRef(BaseModel):
    """A reference to bytes in the blob store."""

    model_config = ConfigDict(frozen=True)

    name: str
    size: int


LOADING_PHASE = "load"


class Progress(BaseModel):
    """How far the backend is, as far as the backend says."""

    model_config = ConfigDict(frozen=True)

    phase: str = "run"
    """`LOADING_PHASE` while the backend loads the model, `queued` while the job waits inside the backend, `run` while the backend works."""
    fraction: float | None = None
    """From 0 to 1."""
    step: int | None = None
    steps: int | None = None
    message: str | None = None
    preview: str | None = None
    """A small preview of the picture, as a data URL of at most `MAX_PREVIEW` characters."""


MAX_PREVIEW = 128 * 1024


class AttemptDone(BaseModel):
    """An attempt has completed the job."""

    model_config = ConfigDict(frozen=True)

    content_type: str = "application/json"
    usage: Usage | None = None
    tokens: int = 0
    """The number of output pieces that the backend sent: tokens, for text."""
    media: MediaUsage | None = None
    blob: BlobRef | None = None
    """The whole answer, when it is too large for events. Then no bytes came before it."""


OLD_HEAD_FIELDS = 3
"""Earlier workers send `<kind> <delivery> <seq>` about synchronous jobs."""


class Frame(NamedTuple):
    """A decoded frame."""

    kind: str
    """A letter of FrameKind, or `schemas.job_events.QUEUED`."""
    run: int
    delivery: int
    seq: int
    token: str
    payload: bytes
    started: bytes = b""
    """The payload of the STARTED that this frame stands for; empty: it stands for none."""
    elapsed_us: int = 0
    """Microseconds since that start."""

    @property
    def id(self) -> str:
        """Return the id under which callers know the event."""
        return f"{self.run}-{self.delivery}-{self.seq}"


def encode_frame(kind: str, run: int, delivery: int, seq: int, token: str, payload: bytes = b"") -> bytes:
    """Return the wire form of a frame."""
    return b"%b %d %d %d %b\n%b" % (kind.encode(), run, delivery, seq, token.encode(), payload)


def encode_first_frame(
    kind: str, run: int, delivery: int, seq: int, token: str, payload: bytes, *, started: bytes, elapsed_us: int
) -> bytes:
    """Return the wire form of a frame that also says that its attempt has started, `elapsed_us` ago."""
    head = (kind.encode(), run, delivery, seq, token.encode(), len(started), elapsed_us)
    return b"%b %d %d %d %b %d %d\n%b%b" % (*head, started, payload)


def decode_frame(data: bytes) -> Frame:
    """Decode the wire form of a frame. Raises ValueError when `data` is no frame."""
    head, newline, payload = data.partition(b"\n")
    if not newline:
        raise ValueError("The data is not a frame: it has no line end after its head.")
    fields = head.split(b" ")
    if len(fields) == OLD_HEAD_FIELDS:
        kind, delivery, seq = fields
        return Frame(kind.decode(), 1, int(delivery), int(seq), "", payload)
    kind, run, delivery, seq, token, *first = fields
    if not first:
        return Frame(kind.decode(), int(run), int(delivery), int(seq), token.decode(), payload)
    size, elapsed_us = map(int, first)
    if not 0 < size <= len(payload) or elapsed_us < 0:
        raise ValueError("The frame's head has a wrong size of its start.")
    started, payload = payload[:size], payload[size:]
    return Frame(kind.decode(), int(run), int(delivery), int(seq), token.decode(), payload, started, elapsed_us)
