"""The terminal word on a job: published once on `nexus.done.<job>`, where the first one wins.

Wire form: `Outcome` as JSON + newline + payload. The payload is the answer's bytes where the job completed and the answer
is small enough to travel so; where it failed, the job message itself, so that it can be tried again.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from schemas.errors import ErrorInfo
from schemas.frames import BlobRef
from schemas.jobs import Capability, Envelope, JobStatus, Lane, Usage


class Outcome(BaseModel):
    """How a job ended. Holds what is needed to make its record anew."""

    model_config = ConfigDict(frozen=True)

    job: str
    run: int = 1
    status: JobStatus
    """One of `schemas.jobs.TERMINAL`."""
    owner: str
    endpoint: str
    """As the caller named it."""
    capability: Capability
    lane: Lane = Lane.DEFAULT
    model: str
    """The model whose queue it stood in."""
    public_model: str
    request_id: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)
    key: str = ""
    webhook: str = ""
    batch: str = ""
    stream: bool = False
    token: str = ""
    """The attempt that ended it; empty: no attempt did."""
    delivery: int = 0
    events: int = 0
    """Events that this attempt stored, STARTED included: a reader who has fewer waits for the others."""
    worker: str = ""
    attempts: int = 0
    granted: bool = True
    """A gateway let the attempt begin, and counted it. False: none answered; `attempts` is the worker's guess."""
    seconds: float | None = None
    """What the attempt took."""
    content_type: str = "application/json"
    usage: Usage | None = None
    adapted: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")], ...] = ()
    """Parameters of the request that were replaced by their nearest equivalent."""
    size: int = 0
    """Bytes of the answer."""
    blob: BlobRef | None = None
    """The answer, where it is too large for the payload."""
    uploads: tuple[str, ...] = ()
    """The blobs that came with the request, and go with the job."""
    error: ErrorInfo | None = None
    dead: bool = False
    """It lies among the dead letters."""
    seal: str = ""
    """Of a worker's: the envelope's. Of a gateway's: over all of it (`backbone.bus.seals`)."""

    def encode(self, payload: bytes = b"") -> bytes:
        """The wire form."""
        return b"".join((self.model_dump_json(exclude_defaults=True).encode(), b"\n", payload))

    @classmethod
    def decode(cls, data: bytes) -> tuple[Outcome, bytes]:
        """Inverse of `encode`. Raises ValueError."""
        line, newline, payload = data.partition(b"\n")
        if not newline:
            raise ValueError("a terminal word must hold a line and a payload")
        return cls.model_validate_json(line), payload


def outcome_of(envelope: Envelope, status: JobStatus, **fields: object) -> Outcome:
    """A word on the job of `envelope`, with what the envelope says about it."""
    return Outcome.model_validate(
        {
            "job": envelope.job,
            "run": envelope.run,
            "status": status,
            "owner": envelope.owner,
            "endpoint": envelope.shown_endpoint or envelope.endpoint,
            "capability": envelope.capability,
            "lane": envelope.lane,
            "model": envelope.model,
            "public_model": envelope.public_model,
            "request_id": envelope.request_id,
            "metadata": envelope.metadata,
            "key": envelope.key,
            "webhook": envelope.webhook,
            "batch": envelope.batch,
            "stream": envelope.stream,
            "uploads": envelope.own_blobs,
            "seal": envelope.seal,
            **fields,
        }
    )
