"""What the rest of the gateway sees of durable jobs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from backbone.bus.job_log import StoredDeadLetter
from gateway.auth.authenticator import Principal
from gateway.http.inference_body import ReceivedRequest
from schemas.endpoints import EndpointSpec
from schemas.errors import ErrorInfo, InvalidRequest, NexusError, NotFound
from schemas.frames import BlobRef
from schemas.job_events import JobEventKind
from schemas.jobs import JobRecord, JobStatus, Lane
from schemas.outcome import Outcome


class JobNotFound(NotFound):
    """There is no such job."""

    code = "job_not_found"


class ResultNotReady(NotFound):
    """The job has not ended yet; its result is not there."""

    code = "result_not_ready"


class JobNotFailed(InvalidRequest):
    """Only a failed job can be tried again."""

    code = "job_not_failed"


class EventsExpired(NexusError):
    """Events of this job are not kept any more; its result may still be."""

    status = 410
    type = "invalid_request_error"
    code = "events_expired"


@dataclass(slots=True)
class Submission:
    """A request that is to become a durable job."""

    principal: Principal
    endpoint: EndpointSpec
    """Which `received.request` was checked for."""
    received: ReceivedRequest
    """Once submitted, its blobs belong to the job; they are removed with it."""
    request_id: str
    lane: Lane | None = None
    """None: as the request's `service_tier` says."""
    metadata: dict[str, str] = field(default_factory=dict)
    webhook: str = ""
    timeout_s: float | None = None
    """From now to `expired`, whatever the job is doing; None: only the usual limits."""
    job_id: str = ""
    """Given where the id follows from something else (a batch's line, an idempotency key): submitted again, it stays one job."""
    shown_endpoint: str = ""
    """What the record says, where it is not the endpoint's path."""
    batch: str = ""
    caller_waits: bool = False
    """Somebody waits for the answer on an open connection: the limits on waiting are those of synchronous requests, and a
    model without a live worker is refused."""


class JobEvent(NamedTuple):
    """One event as a caller gets it."""

    kind: JobEventKind
    id: str
    """`<run>-<delivery>-<seq>`."""
    data: bytes
    """Of CHUNK: bytes of the answer as the endpoint makes them (of an SSE stream one frame, `data: {…}` and its blank line);
    of all others JSON."""
    outcome: Outcome | None = None
    """Of the last event, which says how the job ended."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended, and its answer."""

    outcome: Outcome
    data: bytes
    """The answer, where it is not in `blob`. Of a stream of server-sent events: all its frames, without `[DONE]`."""
    blob: BlobRef | None
    content_type: str

    @property
    def error(self) -> ErrorInfo | None:
        """Why there is no answer."""
        return self.outcome.error


class JobsApi(Protocol):
    """Durable jobs. Every call raises Unavailable where what it needs is away."""

    async def submit(self, submission: Submission) -> JobRecord:
        """Store a job; when this returns it will reach exactly one terminal record.

        Raises ModelNotFound, InvalidRequest, QueueFull, RequestTooLarge, Unavailable; its blobs are the caller's to discard then.
        """

    async def get(self, owner: str, job_id: str) -> JobRecord:
        """The record as it stands, terminal as soon as the job is decided. Raises JobNotFound."""

    async def wait(self, owner: str, job_id: str, seconds: float) -> JobRecord:
        """As `get`, but returns when the job is terminal, or after `seconds`."""

    async def wait_for_result(self, owner: str, job_id: str, seconds: float) -> JobResult | None:
        """How the job ended, as soon as it has; None: it has not within `seconds`. Raises JobNotFound for another owner's."""

    async def result(self, owner: str, job_id: str) -> JobResult:
        """Raises JobNotFound, ResultNotReady."""

    def follow(self, owner: str, job_id: str, after: str = "") -> AsyncGenerator[JobEvent, None]:
        """Events behind the id `after` (empty: all), then those to come, ending with the terminal one; nothing where `after` is
        that one. Close it.

        Raises JobNotFound, InvalidRequest for what is no id, EventsExpired. Each attempt's events are whole and in order; RESTARTED says that
        what came of the last attempt is void.
        """

    def follow_all_attempts(self, owner: str, job_id: str) -> AsyncGenerator[JobEvent | None, None]:
        """As `follow` from the first event, also of attempts that were given up, with None once: all that was kept has been
        told, the rest is new. An attempt that RESTARTED voids before None was void already when the call was made; where the
        job was complete by then, there is no None. Close it.
        """

    async def estimate(self, record: JobRecord) -> tuple[int | None, float | None]:
        """How many jobs wait before a queued one, and in how many seconds a job will have ended, as far as is known."""

    async def cancel(self, owner: str, job_id: str) -> JobRecord:
        """End it as cancelled, unless it has ended: then the record says how. Raises JobNotFound."""

    async def retry(self, owner: str, job_id: str) -> JobRecord:
        """A new run of a failed job. Raises JobNotFound, InvalidRequest when it has not failed or is not kept any more."""

    async def page(
        self, owner: str, *, status: JobStatus | None, model: str, metadata: dict[str, str], after: str, limit: int
    ) -> tuple[list[JobRecord], bool]:
        """Up to `limit` jobs, newest first, behind the id `after`; and whether there may be more."""

    # Dead letters, of all owners

    async def dead_letters(self, *, before: int | None, limit: int) -> list[StoredDeadLetter]:
        """Newest first, with sequences below `before`."""

    async def dead_letter(self, job_id: str) -> StoredDeadLetter:
        """The newest of this job. Raises NotFound."""

    async def replay(self, job_id: str) -> JobRecord:
        """A new run of a dead letter's job, which then is none any more. Raises NotFound, JobNotFailed."""

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
