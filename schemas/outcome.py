"""Define the outcome of a durable job: published once on `nexus.done.<job>`, where the first one wins.

Wire form: `Outcome` as JSON + newline + payload. For a completed job the payload is the answer, when it is small
enough. For a failed job the payload is the job message itself, so that the job can be retried.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from schemas.errors import ErrorInfo
from schemas.frames import BlobRef
from schemas.jobs import Capability, Envelope, JobStatus, Lane, Usage


class Outcome(BaseModel):
    """How a job ended. It holds all that is needed to create the job's record again."""

    model_config = ConfigDict(frozen=True)

    job: str
    run: int = 1
    status: JobStatus
    """A status of `schemas.jobs.TERMINAL_STATUSES`."""
    owner: str
    endpoint: str
    """The endpoint that the caller used."""
    capability: Capability
    lane: Lane = Lane.DEFAULT
    model: str
    """The model whose queue the job was in."""
    public_model: str
    request_id: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)
    key: str = ""
    webhook: str = ""
    batch: str = ""
    stream: bool = False
    token: str = ""
    """The attempt that ended the job. Empty: no attempt ended it."""
    delivery: int = 0
    events: int = 0
    """The number of events that this attempt stored, STARTED included. A reader with fewer events waits for the others."""
    worker: str = ""
    attempts: int = 0
    granted: bool = True
    """The attempt had a start grant, and a gateway counted it. False: no gateway replied, and `attempts` is the worker's estimate."""
    seconds: float | None = None
    """The duration of the attempt."""
    content_type: str = "application/json"
    usage: Usage | None = None
    adapted: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")], ...] = ()
    """Parameters of the request that were replaced by their nearest equivalent."""
    size: int = 0
    """Bytes of the answer."""
    blob: BlobRef | None = None
    """The answer, when it is too large for the payload."""
    uploads: tuple[str, ...] = ()
    """The blobs that came with the request and are deleted with the job."""
    error: ErrorInfo | None = None
    dead: bool = False
    """The job has a dead letter."""
    seal: str = ""
    """By a worker: the envelope's seal. By a gateway: a seal over the whole outcome (`backbone.bus.seals`)."""

    def encode(self, payload: bytes = b"") -> bytes:
        """Return the wire form."""
        return b"".join((self.model_dump_json(exclude_defaults=True).encode(), b"\n", payload))

    @classmethod
    def decode(cls, data: bytes) -> tuple[Outcome, bytes]:
        """Decode the wire form into the outcome and its payload. Raises ValueError."""
        line, newline, payload = data.partition(b"\n")
        if not newline:
            raise ValueError("An outcome needs a line of JSON and a payload.")
        return cls.model_validate_json(line), payload


def outcome_of(envelope: Envelope, status: JobStatus, **fields: object) -> Outcome:
    """Return an outcome for the job of `envelope`. `fields` are those of `Outcome` that the envelope does not hold."""
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
