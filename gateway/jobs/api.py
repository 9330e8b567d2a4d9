"""The protocol of durable jobs, as routes, batches and responses use it, with its types and errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from backbone.bus.job_log import StoredDeadLetter
from backbone.tracing.spans import Span
from gateway.auth.authenticator import Principal
from gateway.http.inference_body import ReceivedRequest
from schemas.endpoints import EndpointSpec
from schemas.errors import ErrorInfo, InvalidRequest, NexusError, NotFound
from schemas.frames import BlobRef
from schemas.job_events import JobEventKind
from schemas.jobs import JobRecord, Lane
from schemas.outcome import Outcome


class JobNotFound(NotFound):
    """The job does not exist or belongs to another owner."""

    code = "job_not_found"


class ResultNotReady(NotFound):
    """The job has not ended yet, so it has no result. Retry later."""

    code = "result_not_ready"


class JobNotFailed(InvalidRequest):
    """The job has not failed. Only failed jobs can be retried."""

    code = "job_not_failed"


class JobNotWaiting(NexusError):
    """The job does not wait: it has started or ended. Only a waiting job can change its lane."""

    status = 409
    type = "invalid_request_error"
    code = "job_not_waiting"
    should_retry = False


class EventsExpired(NexusError):
    """The job's events have been deleted after their retention time. The result may still be stored."""

    status = 410
    type = "invalid_request_error"
    code = "events_expired"


@dataclass(slots=True)
class Submission:
    """A validated request to submit as a durable job."""

    principal: Principal
    endpoint: EndpointSpec
    """The endpoint that `received.request` was validated for."""
    received: ReceivedRequest
    """The request. After submission its blobs belong to the job and are deleted with it."""
    request_id: str
    lane: Lane | None = None
    """The job's lane. None: the lane of the request's `service_tier`."""
    metadata: dict[str, str] = field(default_factory=dict)
    webhook: str = ""
    timeout_s: float | None = None
    """Seconds from now until an unfinished job expires. None: only the configured limits apply."""
    job_id: str = ""
    """The job's id, if it derives from a batch line or an idempotency key: repeated submissions then stay one job."""
    shown_endpoint: str = ""
    """The endpoint that the record shows. Empty: the endpoint's path."""
    batch: str = ""
    span: Span | None = None
    """The span of the request; None: the job, if it is traced, has a trace of its own."""
    caller_waits: bool = False
    """Whether the caller waits on an open connection. The queue limits of synchronous requests then apply, and a model
    without a live worker is rejected."""


class JobEvent(NamedTuple):
    """One event of a job, as callers receive it."""

    kind: JobEventKind
    id: str
    """`<run>-<delivery>-<seq>`."""
    data: bytes
    """For CHUNK: bytes of the response body (of an SSE stream exactly one frame, including its blank line).
    For all other kinds: JSON."""
    outcome: Outcome | None = None
    """The job's outcome. Only the terminal event has it."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """The outcome of a job and its response body."""

    outcome: Outcome
    data: bytes
    """The response body, unless `blob` holds it. For a stream of server-sent events: all frames, without `[DONE]`."""
    blob: BlobRef | None
    content_type: str

    @property
    def error(self) -> ErrorInfo | None:
        """The error of a job that did not complete."""
        return self.outcome.error


class JobsApi(Protocol):
    """Submits, follows and controls durable jobs. Every method raises Unavailable if NATS or Redis does not answer."""

    async def submit(self, submission: Submission) -> JobRecord:
        """Store a job. Once this method returns, the job reaches exactly one terminal status.

        Raises ModelNotFound, InvalidRequest, QueueFull, RequestTooLarge, Unavailable. If it raises, the caller discards the request's blobs.
        """

    async def get(self, owner: str, job_id: str) -> JobRecord:
        """Return the current record. It is terminal as soon as the job's outcome is stored. Raises JobNotFound."""

    async def wait(self, owner: str, job_id: str, seconds: float) -> JobRecord:
        """Wait until the job is terminal, at most `seconds`, and return its record. Raises JobNotFound."""

    async def wait_for_result(self, owner: str, job_id: str, seconds: float) -> JobResult | None:
        """Wait for the job to end and return its result, or None after `seconds`. Raises JobNotFound for another owner's job."""

    async def result(self, owner: str, job_id: str) -> JobResult:
        """Return the result of an ended job. Raises JobNotFound, ResultNotReady, NotFound."""

    async def input(self, owner: str, job_id: str) -> object:
        """Return the job's request as JSON. Raises JobNotFound, InputNotKept."""

    async def confirm_delivery(self, outcome: Outcome) -> None:
        """Note that the caller has received the whole result of a job. What must not be kept is deleted; never raises Unavailable."""

    def follow(self, owner: str, job_id: str, after: str = "") -> AsyncGenerator[JobEvent, None]:
        """Yield the stored events after the id `after` (empty: all), then new events, up to the terminal event.

        Yields nothing if `after` is the terminal event. The caller closes the generator. Each attempt's events are
        complete and in order; RESTARTED voids the events of the previous attempt.

        Raises JobNotFound, EventsExpired, and InvalidRequest if `after` is not an event id.
        """

    def follow_all_attempts(self, owner: str, job_id: str) -> AsyncGenerator[JobEvent | None, None]:
        """Yield all events, including those of superseded attempts; then None once; then new events.

        None separates the events that were stored at the time of the call from new ones. An attempt that a RESTARTED
        before None voids was already void at that time. If the job had completed by then, there is no None. The caller
        closes the generator.
        """

    async def estimate(self, record: JobRecord) -> tuple[int | None, float | None]:
        """Return a queued job's queue position, and the estimated seconds until the job ends. Either is None if unknown."""

    async def cancel(self, owner: str, job_id: str) -> JobRecord:
        """Cancel a job that has not ended, and return its record. Raises JobNotFound."""

    async def change_lane(self, owner: str, job_id: str, lane: Lane) -> JobRecord:
        """Let a waiting job wait in another lane. It runs once, whatever is killed meanwhile. Raises JobNotFound, JobNotWaiting."""

    async def retry(self, owner: str, job_id: str) -> JobRecord:
        """Start a new run of a failed job. Raises JobNotFound, and JobNotFailed if the job cannot be retried."""

    # Dead letters of all owners

    async def dead_letters(self, *, before: int | None, limit: int) -> list[StoredDeadLetter]:
        """Return up to `limit` dead letters with sequence numbers below `before`, newest first."""

    async def dead_letter(self, job_id: str) -> StoredDeadLetter:
        """Return the newest dead letter of a job. Raises NotFound."""

    async def replay(self, job_id: str) -> JobRecord:
        """Start a new run of a dead letter's job and delete the dead letter. Raises NotFound, JobNotFailed."""

    async def replay_letter(self, letter: StoredDeadLetter) -> JobRecord:
        """Start a new run of this dead letter's job and delete the dead letter. Raises JobNotFailed."""

    async def delete_letter(self, letter: StoredDeadLetter) -> None:
        """Delete this dead letter. Idempotent."""

    async def delete_dead_letters(self, job_id: str) -> None:
        """Delete the dead letters of a job. Raises NotFound."""


__all__ = [
    "EventsExpired",
    "JobEvent",
    "JobNotFailed",
    "JobNotFound",
    "JobResult",
    "JobsApi",
    "ResultNotReady",
    "StoredDeadLetter",
    "Submission",
]
