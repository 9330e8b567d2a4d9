"""Define the outcome of a durable job: published once on `nexus.done.<job>`, where the first one wins.

Wire form: `Outcome` as JSON + newline + payload. For a completed job the payload is the answer, when it is small
enough. For a failed job the payload is the job message itself, so that the job can be retried.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, StringConstraints

from schemas.errors import ErrorInfo
from schemas.frames import BlobRef
from schemas.jobs import Envelope, JobSpec, JobStatus, Usage
from schemas.traces import Traceparent
from schemas.usage import MediaUsage


class RunStatus(BaseModel):
    """The status of one run of a job."""

    job: str
    run: int = 1
    status: JobStatus


class Outcome(
    JobSpec, RunStatus
):  # RunStatus: gateways of earlier versions seal the fields in their order, `status` third
    """How a job ended. It holds all that is needed to create the job's record again.

    `status` is one of `schemas.jobs.TERMINAL_STATUSES`.
    """

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
    first_output_s: float | None = None
    """Seconds from the start of the attempt to its first output. None: it had none, or the worker did not say."""
    content_type: str = "application/json"
    usage: Usage | None = None
    media: MediaUsage | None = None
    adapted: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")], ...] = ()
    """Parameters of the request that were replaced by their nearest equivalent."""
    size: int = 0
    """Bytes of the answer."""
    input_size: int = 0
    """Bytes of the request's body and files."""
    blob: BlobRef | None = None
    """The answer, when it is too large for the payload."""
    uploads: tuple[str, ...] = ()
    """The blobs that came with the request and are deleted with the job."""
    error: ErrorInfo | None = None
    dead: bool = False
    """The job has a dead letter."""
    traceparent: Traceparent = ""
    """By a worker: the span below which the job's trace goes on."""
    sealed: bool = False
    """The job is sealed: the payload is encrypted, and so is `blob` within it (`backbone.bus.content_seals`)."""
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


def outcome_of(job: JobSpec, status: JobStatus, **fields: object) -> Outcome:
    """Return an outcome of the job. `fields` are those of `Outcome` that are not part of the specification."""
    seal = job.seal if isinstance(job, Envelope) else ""
    sealed = bool(getattr(job, "sealed", False))
    traceparent = job.traceparent if isinstance(job, Envelope) else ""
    given = {"status": status, "seal": seal, "sealed": sealed, "traceparent": traceparent}
    return Outcome.model_validate(job.spec() | given | fields)
