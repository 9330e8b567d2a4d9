"""Define a job: one request for one model, as it travels from the gateway to a worker."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any, Literal

from pydantic import AliasPath, BaseModel, ConfigDict, Field

from schemas.endpoints import Capability as Capability  # noqa: PLC0414 - a job names it, and those who read jobs need it
from schemas.names import Subject, SubjectToken
from schemas.traces import TraceContext, Traceparent, Tracestate, read_trace_context


class Lane(StrEnum):
    """A priority class. Lanes are served in the order of their definition."""

    PRIORITY = "priority"
    DEFAULT = "default"
    FLEX = "flex"

    __hash__ = str.__hash__


LANES = tuple(Lane)
LANE_BY_TIER = {"priority": Lane.PRIORITY, "flex": Lane.FLEX}
"""The lane for a request's `service_tier`. Every other tier means the default lane."""
MAX_STARTS = 3
"""Attempts of a job that may be started and lost; then the job counts as poison and fails."""


class Limits(BaseModel):
    """The time limits of the parts of a job's life, in seconds. Durations travel, since the clocks of machines differ."""

    model_config = ConfigDict(frozen=True)

    queue_s: float = 300.0
    """From acceptance to the start of the first attempt."""
    first_token_s: float = 120.0
    """From the attempt's start to the first byte from the backend."""
    idle_s: float = 60.0
    """Between two chunks from the backend."""
    total_s: float = 900.0
    """From the attempt's start to its end, without the time to load a model."""
    load_s: float = 600.0
    """For the backend to load the model, if the backend reports that it does."""


class Usage(BaseModel):
    """The number of tokens, in OpenAI's terms."""

    model_config = ConfigDict(frozen=True, extra="allow")

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Upload(BaseModel):
    """A file that came with a request."""

    model_config = ConfigDict(frozen=True)

    field: str
    """The form field, without the `[]` that some clients add: `file`, `image`, `mask`."""
    filename: str = ""
    content_type: str = "application/octet-stream"
    size: int
    """Bytes."""
    blob: str | None = None
    """The name of its blob. None: the file follows the body in the job message, in the order of `Envelope.uploads`."""
    kept: bool = False
    """The caller owns the file, so that it is not deleted with the job."""


class JobSpec(BaseModel):
    """The specification of one run of a job: what a gateway decides when it accepts the request, and no attempt changes.

    It travels to the worker in the job message (`Envelope`), is repeated by the outcome (`schemas.outcome.Outcome`), and is
    shown to the caller by the record (`JobRecord`); any of the three can be made from any other. Each of them writes these
    fields flat into its JSON.
    """

    model_config = ConfigDict(frozen=True)

    job: str
    """`job_` and 32 hex digits of a UUIDv7."""
    run: int = 1
    """Counts retries and replays of the job. NATS's own redeliveries are deliveries."""
    owner: str
    endpoint: str
    """The endpoint that the caller used."""
    capability: Capability
    lane: Lane = Lane.DEFAULT
    model: str
    """The name under which workers offer the model: aliases are resolved. The job is in this model's queue."""
    public_model: str
    """The name that the caller used, which answers carry."""
    request_id: str = ""
    """`req_…`, the same in every log event and in the response's `x-request-id`."""
    metadata: dict[str, str] = Field(default_factory=dict)
    key: str = ""
    """The id of the API key whose limits the job counts against."""
    webhook: str = ""
    """The URL that receives the job's outcome."""
    batch: str = ""
    """The id of the batch that the job is a line of."""
    stream: bool = False

    def spec(self) -> dict[str, Any]:
        """Return the specification, and as `uploads` the names of the blobs that are deleted with the job.

        The seal of a job covers these values in this order (`backbone.bus.seals`).
        """
        values = self.__dict__
        return {name: values[name] for name in SPEC_FIELDS}


SPEC_FIELDS = (*JobSpec.model_fields, "uploads")


class Envelope(JobSpec):
    """The first line of a job message. The request's body follows it, and then the inline uploads.

    Wire form: `envelope JSON` + newline + `body` + inline uploads. The body holds the bytes that the caller sent; for
    a multipart form it holds the fields as a JSON object. A large body travels as a blob.
    """

    job: SubjectToken
    owner: str = "default"
    endpoint: str
    """The endpoint whose request the body holds: `/v1/responses` travels as chat. See `shown_endpoint`."""
    reply: Subject
    """The subject for frames. It holds 128 random bits per run, so that others cannot guess it."""
    hops: int = 0
    """The number of gateways that the request had passed before this one."""
    limits: Limits = Limits()
    body_size: int | None = None
    """Bytes of the body, when inline uploads follow it. None: all that follows is the body."""
    body_blob: str | None = None
    """The name of the body's blob, when the body does not travel inline."""
    uploads: tuple[Upload, ...] = ()
    keep_s: float = 3600.0
    """Seconds for which a result that is fetched by URL is stored; for a durable job, its result in any form."""
    durable: bool = False
    """The job's events and outcome are stored, and the job continues when its caller disconnects."""
    stream_type: str = ""
    """The content type of an answer that is passed on while it is produced. Empty: the answer comes in one piece."""
    shown_endpoint: str = ""
    """The endpoint that the caller used, when it differs from `endpoint`."""
    unsupported: Literal["", "refuse", "adapt"] = ""
    """The alias's policy for parameters that the server lacks. Empty: the worker's own policy."""
    sealed: bool = False
    """The body is encrypted (`backbone.bus.content_seals`). The worker gets its key with the start grant, and does not start without."""
    sealed_blobs: tuple[str, ...] = ()
    """For a sealed job: `own_blobs` without their keys. The sealed body holds the fields that lead to content."""
    traceparent: Traceparent = ""
    """The span below which the job's trace goes on (W3C Trace Context). Empty: the job is not traced."""
    tracestate: Tracestate = ""
    ticket: str = ""
    """For durable jobs: the key of the attempts' tokens. Gateways check it and the seals (`backbone.bus.seals`)."""
    seal: str = ""
    """For durable jobs: the value that the outcome must repeat."""
    message_seal: str = ""
    """For durable jobs: the seal over the whole message but this field, which is therefore the last one."""

    def spec(self) -> dict[str, Any]:
        """Return the specification; see `JobSpec.spec`."""
        return super().spec() | {"endpoint": self.shown_endpoint or self.endpoint, "uploads": self.own_blobs}

    @property
    def trace(self) -> TraceContext | None:
        """Return the position in the trace; None: the job is not traced."""
        return read_trace_context(self.traceparent, self.tracestate) if self.traceparent else None

    @property
    def own_blobs(self) -> tuple[str, ...]:
        """Return the names of the blobs that came with the request and are deleted with the job."""
        if self.sealed_blobs:
            return self.sealed_blobs
        blobs = [self.body_blob, *(upload.blob for upload in self.uploads if not upload.kept)]
        return tuple(blob for blob in blobs if blob)

    def encode(self, body: bytes) -> bytes:
        """Return the job message for this envelope and `body`. Inline uploads follow it."""
        return b"".join((self.model_dump_json(exclude_defaults=True).encode(), b"\n", body))

    @classmethod
    def decode(cls, message: bytes) -> tuple[Envelope, bytes]:
        """Split a job message into its envelope and the rest. Raises ValueError (pydantic's ValidationError is one)."""
        line, newline, body = message.partition(b"\n")
        if not newline:
            raise ValueError("A job message needs an envelope line and a body.")
        return cls.model_validate_json(line), body


class EnvelopeTemplate:
    """Makes the envelopes of jobs that differ in their ids only. It validates and encodes the other fields once."""

    IDS = frozenset({"job", "request_id", "reply"})

    def __init__(self, envelope: Envelope) -> None:
        self._state = envelope.__getstate__()
        self._values = envelope.__dict__
        self._line_end = envelope.model_dump_json(exclude_defaults=True, exclude=set(self.IDS)).encode()[1:]

    def fill(self, job: str, request_id: str, reply: str) -> tuple[Envelope, bytes]:
        """Return an envelope and its line of the job message. The ids must be valid, and need no escapes in JSON."""
        envelope = Envelope.__new__(Envelope)
        ids = {"job": job, "request_id": request_id, "reply": reply}
        envelope.__setstate__(self._state | {"__dict__": self._values | ids})
        line = f'{{"job":"{job}","request_id":"{request_id}","reply":"{reply}",'.encode() + self._line_end
        return envelope, line


def with_trace(envelope: Envelope, line: bytes, trace: TraceContext) -> tuple[Envelope, bytes]:
    """Return the envelope, and its line of the job message (empty: there is none), below a span."""
    head = b'{"traceparent":"%b",' % trace.traceparent.encode()
    if trace.tracestate:
        head += b'"tracestate":%b,' % json.dumps(trace.tracestate).encode()
    return envelope.model_copy(update=trace._asdict()), line and head + line[1:]


def is_sse(content_type: str) -> bool:
    """Return whether a stream of this content type consists of server-sent events."""
    return content_type.startswith("text/event-stream")


class JobStatus(StrEnum):
    """The state of a job, by OpenAI's names."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL_STATUSES = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED})

LEGAL_TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.IN_PROGRESS, *TERMINAL_STATUSES}),
    # Back to the queue: the worker died or drained, and another one pulls the job.
    # To where it is: another attempt of the run begins, before a gateway has moved the record back.
    JobStatus.IN_PROGRESS: frozenset({JobStatus.QUEUED, JobStatus.IN_PROGRESS, *TERMINAL_STATUSES}),
    # Only as a new run of the same job: a retry.
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.EXPIRED: frozenset(),
}


class WebhookDelivery(BaseModel):
    """One attempt to deliver a job's outcome to its webhook."""

    model_config = ConfigDict(frozen=True, title="Delivery")

    at: int
    """Unix seconds."""
    attempt: int
    status: int | None = None
    """The receiver's HTTP status. None: the receiver did not answer."""
    error: str | None = None


class WebhookState(BaseModel):
    """The webhook of a job and its deliveries."""

    model_config = ConfigDict(frozen=True)

    url: str
    state: Literal["pending", "delivered", "failed"] = "pending"
    deliveries: tuple[WebhookDelivery, ...] = ()
    """The newest deliveries, oldest first."""


MAX_ATTEMPTS_KEPT = 16
"""The attempts of a job that its record holds: the newest."""


class JobAttempt(BaseModel):
    """One attempt at a job. Times are Unix milliseconds, by the gateways' clock."""

    model_config = ConfigDict(frozen=True, title="Attempt")

    run: int
    number: int
    """The number of the attempt in its run. An attempt that a worker returned because it shut down does not count: the next one has its number."""
    worker: str
    started_ms: int
    first_output_ms: int | None = None
    """When the first output came: a token, for text. None: none came, or the attempt has not completed."""
    ended_ms: int | None = None
    """When the attempt ended; for a worker that was lost, when that was noticed. None: it runs."""
    end: str | None = None
    """Why it ended: `completed`, `failed`, `cancelled`, `expired`, `returned` (to the queue) or `worker_lost`."""
    code: str | None = None
    """The code of the error for which it failed or was returned."""


class JobRecord(JobSpec):
    """The record of a durable job in Redis. Its JSON has the API's names; see `encode` and `decode`."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=False)

    job: str = Field(alias="id")
    capability: Capability = Capability.CHAT
    lane: Lane = Field(Lane.DEFAULT, alias="service_tier")
    model: str = Field(alias="queue_model")
    public_model: str = Field(alias="model")
    webhook: str = Field("", validation_alias=AliasPath("webhook", "url"), exclude=True)
    webhook_state: WebhookState | None = Field(None, alias="webhook")
    status: JobStatus = JobStatus.QUEUED
    attempts: int = 0
    """The attempts of this run that were started, without those that a worker returned because it shut down."""
    seq: int | None = None
    """The sequence of the newest run's message in the jobs stream, once the gateway knows it."""
    created_at: int
    """Unix seconds, by the gateway's clock."""
    queued_at: int | None = None
    """The time at which the job began to wait. None: `created_at`."""
    started_at: int | None = None
    """The time at which the newest attempt began."""
    finished_at: int | None = None
    expires_at: int | None = None
    """The time at which the job ends as `expired` unless it has ended. None: only the limit on waiting applies."""
    progress: float | None = None
    worker: str | None = None
    usage: dict[str, Any] | None = None
    adapted: tuple[str, ...] = ()
    """Parameters that were replaced by their nearest equivalent."""
    error: dict[str, Any] | None = None
    queue_s: float = 86_400.0
    """Seconds for which the job may wait for a worker."""
    uploads: tuple[str, ...] = ()
    """The blobs that came with the request and are deleted with the job: `Envelope.own_blobs`."""
    sealed: Literal[True] | None = None
    """The job's content is encrypted, and may be forgotten before its record. None: it is not."""
    traceparent: Traceparent | None = None
    """The span below which the job's trace goes on. None: the job is not traced."""
    history: tuple[JobAttempt, ...] = Field((), exclude_if=lambda attempts: not attempts)
    """The newest attempts of all runs, oldest first: at most `MAX_ATTEMPTS_KEPT`."""
    reserved_tokens: int | None = None
    """Tokens that the run has taken of its limits per minute, by estimate. None: it took none."""

    @classmethod
    def of(cls, job: JobSpec, **state: Any) -> JobRecord:
        """Return a record of the job. `state` holds the fields that are not part of the specification."""
        webhook = WebhookState(url=job.webhook) if job.webhook else None
        sealed = getattr(job, "sealed", None) or None
        traceparent = getattr(job, "traceparent", None) or None
        return cls.model_validate(
            job.spec() | {"webhook_state": webhook, "sealed": sealed, "traceparent": traceparent} | state
        )

    def encode(self) -> bytes:
        """Return the record as JSON."""
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()

    @classmethod
    def decode(cls, data: bytes | str) -> JobRecord:
        """Decode the JSON of a record. Raises ValueError (pydantic's ValidationError is one)."""
        return cls.model_validate_json(data, by_alias=True, by_name=False)
