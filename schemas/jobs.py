"""A job: one request for one model, as it travels from the gateway to a worker."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.endpoints import Capability as Capability  # noqa: PLC0414 - a job names it, and those who read jobs need it
from schemas.names import Subject, SubjectToken


class Lane(StrEnum):
    """Which line a job stands in. The order of definition is the order of service."""

    PRIORITY = "priority"
    DEFAULT = "default"
    FLEX = "flex"

    __hash__ = str.__hash__


LANES = tuple(Lane)
LANE_BY_TIER = {"priority": Lane.PRIORITY, "flex": Lane.FLEX}
"""Every other `service_tier` is the default lane."""
MAX_STARTS = 3
"""Attempts of a job that may be started and lost; then the job counts as poison and fails."""


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
    kept: bool = False
    """It is a file of the caller's, and not removed with the job."""


class Envelope(BaseModel):
    """The first line of a job message. The request's body follows it, and after that the uploads that travel inline.

    Wire form: `envelope JSON` + newline + `body` + inline uploads. The body is what the caller sent, byte for byte; of
    a multipart form, its fields as a JSON object. A large one travels as a blob.
    """

    model_config = ConfigDict(frozen=True)

    job: SubjectToken
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
    reply: Subject
    """Subject for events; holds 128 random bits per run, so that nobody else can guess it."""
    owner: str = "default"
    hops: int = 0
    """Through how many gateways the request had come before this one."""
    limits: Limits = Limits()
    metadata: dict[str, str] = Field(default_factory=dict)
    body_size: int | None = None
    """Bytes of the body, where inline uploads follow it; None: all that follows is the body."""
    body_blob: str | None = None
    """The body's name among the blobs, where it does not travel inline."""
    uploads: tuple[Upload, ...] = ()
    keep_s: float = 3600.0
    """How long a result that the caller gets by URL is kept, in seconds; of a durable job, its result in any form."""
    durable: bool = False
    """The job is not its caller's: its events and its terminal word are stored, and it goes on whoever goes away."""
    stream_type: str = ""
    """The content type of an answer that is passed on as it is made; empty: the answer comes in one piece."""
    shown_endpoint: str = ""
    """The endpoint that the caller used, where it is not `endpoint`: `/v1/responses` travels as chat."""
    key: str = ""
    """The id of the API key that the job counts against."""
    unsupported: Literal["", "refuse", "adapt"] = ""
    """What becomes of parameters that the server lacks, where the alias says so; empty: as the worker does."""
    webhook: str = ""
    """The URL that is told of the job's end."""
    batch: str = ""
    """The batch that the job is a line of."""
    ticket: str = ""
    """Of a durable job: the key of its attempts' tokens. It and the seals are for gateways to check (`backbone.bus.seals`)."""
    seal: str = ""
    """Of a durable job: what its outcome must repeat."""
    message_seal: str = ""
    """Of a durable job: over all of its message."""

    @property
    def own_blobs(self) -> tuple[str, ...]:
        """The blobs that came with the request, and go with the job."""
        blobs = [self.body_blob, *(upload.blob for upload in self.uploads if not upload.kept)]
        return tuple(blob for blob in blobs if blob)

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


def is_sse(content_type: str) -> bool:
    """Whether a stream of this content type consists of server-sent events."""
    return content_type.startswith("text/event-stream")


class JobStatus(StrEnum):
    """OpenAI's words for where a job stands."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL_STATUSES = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED})

LEGAL_TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.IN_PROGRESS, *TERMINAL_STATUSES}),
    # Back to the queue: the worker died or drained, and another one will take the job.
    # To where it is: another attempt of the run begins, before anybody has put the record back.
    JobStatus.IN_PROGRESS: frozenset({JobStatus.QUEUED, JobStatus.IN_PROGRESS, *TERMINAL_STATUSES}),
    # Only as a new run of the same job: a retry.
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.EXPIRED: frozenset(),
}


class WebhookDelivery(BaseModel):
    """One try to tell a webhook."""

    model_config = ConfigDict(frozen=True, title="Delivery")

    at: int
    """Unix seconds."""
    attempt: int
    status: int | None = None
    """What the receiver answered; None: it did not."""
    error: str | None = None


class WebhookState(BaseModel):
    """What a job record says about its webhook."""

    model_config = ConfigDict(frozen=True)

    url: str
    state: Literal["pending", "delivered", "failed"] = "pending"
    deliveries: tuple[WebhookDelivery, ...] = ()
    """The newest tries, oldest first."""


class JobRecord(BaseModel):
    """What Redis holds about a job."""

    model_config = ConfigDict(frozen=True)

    id: str
    owner: str
    endpoint: str
    """As the caller named it."""
    model: str
    """As the caller named it."""
    capability: Capability = Capability.CHAT
    queue_model: str = ""
    """The model whose queue it stands in; empty: `model`."""
    service_tier: Lane = Lane.DEFAULT
    status: JobStatus = JobStatus.QUEUED
    run: int = 1
    attempts: int = 0
    """Attempts of this run that were started and not handed back by a worker that shut down."""
    seq: int | None = None
    """Of the newest run's message in the jobs stream, once it is known."""
    created_at: int
    """Unix seconds, by the gateway's clock."""
    queued_at: int | None = None
    """Since when it waits; None: since `created_at`."""
    started_at: int | None = None
    """When its newest attempt began."""
    finished_at: int | None = None
    expires_at: int | None = None
    """When it ends as `expired` if it has not ended before; None: only the limit on waiting holds."""
    progress: float | None = None
    worker: str | None = None
    usage: dict[str, Any] | None = None
    adapted: tuple[str, ...] = ()
    """Parameters that were replaced by their nearest equivalent."""
    error: dict[str, Any] | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    key: str = ""
    """The id of the API key it counts against."""
    request_id: str = ""
    stream: bool = False
    queue_s: float = 86_400.0
    """How long it may wait for a worker."""
    batch: str = ""
    uploads: tuple[str, ...] = ()
    """The blobs that came with the request, and go with the job: `Envelope.own_blobs`."""
    webhook: WebhookState | None = None

    @property
    def queue_name(self) -> str:
        """The model whose queue it stands in."""
        return self.queue_model or self.model
