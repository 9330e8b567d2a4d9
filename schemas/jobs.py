"""A job: one request for one model, as it travels from the gateway to a worker."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Capability(StrEnum):
    """What a model can be asked to do; the first token of a job's subject."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    IMAGES = "images"
    SPEECH = "speech"
    TRANSCRIPTIONS = "transcriptions"
    RERANK = "rerank"
    MODELS = "models"


class Lane(StrEnum):
    """Which line a job stands in. The order of definition is the order of service."""

    PRIORITY = "priority"
    DEFAULT = "default"
    FLEX = "flex"


LANES = tuple(Lane)


class Limits(BaseModel):
    """How long each part of a job's life may take, in seconds. Durations travel; timestamps do not, since clocks differ."""

    model_config = ConfigDict(frozen=True)

    queue_s: float = 300.0
    """From acceptance to the first `started`."""
    first_token_s: float = 120.0
    """From `started` to the first byte from the backend."""
    idle_s: float = 60.0
    """Between two chunks of the backend."""
    total_s: float = 900.0
    """From `started` to the end, without the time to load a model."""
    load_s: float = 600.0
    """For the backend to load the model, where it says that it does."""


class Usage(BaseModel):
    """Tokens spent, in OpenAI's terms."""

    model_config = ConfigDict(frozen=True, extra="allow")

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Upload(BaseModel):
    """A file that came with a request."""

    model_config = ConfigDict(frozen=True)

    field: str
    """The form's field, without the `[]` that some clients add: `file`, `image`, `mask`."""
    filename: str = ""
    content_type: str = "application/octet-stream"
    size: int
    """Bytes."""
    blob: str | None = None
    """Its name among the blobs; None: it follows the body in the job message, in the order of `Envelope.uploads`."""


class Envelope(BaseModel):
    """The first line of a job message. The request's body follows it, and after that the uploads that travel inline.

    Wire form: `envelope JSON` + newline + `body` + inline uploads. The body is what the caller sent, byte for byte; of
    a multipart form, its fields as a JSON object. A large one travels as a blob.
    """

    model_config = ConfigDict(frozen=True)

    job: str
    """`job_` and 32 hex digits of a UUIDv7."""
    run: int = 1
    """Counts retries and replays of one job; NATS's own redeliveries are counted as deliveries."""
    request_id: str
    """`req_…`, the same in every log line and in the response's `x-request-id`."""
    endpoint: str
    capability: Capability
    lane: Lane = Lane.DEFAULT
    model: str
    """The name under which workers offer the model (aliases are resolved)."""
    public_model: str
    """The name that the caller used and is answered with."""
    stream: bool = False
    reply: str
    """Subject for events; holds 128 random bits per run, so that nobody else can guess it."""
    owner: str = "default"
    limits: Limits = Limits()
    metadata: dict[str, str] = Field(default_factory=dict)
    body_size: int | None = None
    """Bytes of the body, where inline uploads follow it; None: all that follows is the body."""
    body_blob: str | None = None
    """The body's name among the blobs, where it does not travel inline."""
    uploads: tuple[Upload, ...] = ()
    keep_s: float = 3600.0
    """How long a result that the caller gets by URL is kept, in seconds."""

    def encode(self, body: bytes) -> bytes:
        """The job message for this envelope and `body`, which inline uploads follow."""
        return b"".join((self.model_dump_json(exclude_defaults=True).encode(), b"\n", body))

    @classmethod
    def decode(cls, message: bytes) -> tuple[Envelope, bytes]:
        """Split a job message into envelope and what follows. Raises ValueError (pydantic's ValidationError is one)."""
        line, newline, body = message.partition(b"\n")
        if not newline:
            raise ValueError("a job message must hold an envelope line and a body")
        return cls.model_validate_json(line), body


class JobStatus(StrEnum):
    """OpenAI's words for where a job stands."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED})

LEGAL_MOVES: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.IN_PROGRESS, *TERMINAL}),
    # Back to the queue: the worker died or drained, and another one will take the job.
    JobStatus.IN_PROGRESS: frozenset({JobStatus.QUEUED, *TERMINAL}),
    # A retry is a new run of the same job.
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.EXPIRED: frozenset(),
}


class JobRecord(BaseModel):
    """What Redis holds about a job, and what `GET /v1/jobs/{id}` will show."""

    model_config = ConfigDict(frozen=True)

    id: str
    owner: str
    endpoint: str
    model: str
    service_tier: Lane = Lane.DEFAULT
    status: JobStatus = JobStatus.QUEUED
    run: int = 1
    attempts: int = 0
    created_at: int
    """Unix seconds, by the gateway's clock."""
    started_at: int | None = None
    finished_at: int | None = None
    progress: float | None = None
    worker: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
