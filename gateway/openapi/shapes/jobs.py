"""The response bodies of `/v1/jobs` and `/v1/dlq`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from gateway.openapi.shapes.errors import ErrorDetail
from schemas.jobs import Capability, JobStatus, Lane, WebhookState


class AttemptDetail(BaseModel):
    """One attempt at a job."""

    run: int
    number: int
    """The number of the attempt in its run. Attempts that a worker returned because it shut down do not count."""
    worker: str
    started_at: float
    first_output_at: float | None
    """When the first output came: a token, for text. Null: none came, or the attempt has not completed."""
    ended_at: float | None
    """When the attempt ended; for a lost worker, when the loss was noticed. Null: it runs."""
    end: Literal["completed", "failed", "cancelled", "expired", "returned", "worker_lost"] | None
    """Why it ended. `returned`: the worker gave the job back to its queue."""
    code: str | None
    """The code of the error for which the attempt failed or was returned."""


class Job(BaseModel):
    """A durable job: a stored request that a worker runs later."""

    id: str
    object: Literal["job"]
    endpoint: str
    """The endpoint that the request is for."""
    capability: Capability
    model: str
    service_tier: Lane
    """The lane in which the job waits."""
    status: JobStatus
    created_at: int
    """Unix seconds, like all times in this object."""
    queued_at: int
    """When the job began to wait for its latest run."""
    started_at: int | None
    """When the latest attempt started."""
    finished_at: int | None
    expires_at: int | None
    """When an unfinished job ends with the status `expired`."""
    run: int
    """The number of the run: 1, plus 1 for each retry."""
    attempts: int
    """The number of attempts of this run so far."""
    queue_position: int | None
    """The number of jobs that wait ahead of this job."""
    eta_seconds: float | None
    """The estimated number of seconds until the job ends. Null if there is no estimate."""
    progress: float | None
    """Progress from 0 to 1. Null if the inference server does not report it."""
    worker: str | None
    """The worker that runs the job or ran it last."""
    key: str | None
    """The id of the API key, or of the person in a session, that submitted the job. Null: the bootstrap key."""
    request_id: str | None
    """The `x-request-id` of the request that submitted the job."""
    usage: dict[str, Any] | None
    error: ErrorDetail | None
    """Why the job failed."""
    metadata: dict[str, str]
    result_url: str
    events_url: str
    trace_id: str | None = None
    """The id of the job's trace; missing if tracing is off."""
    attempts_detail: list[AttemptDetail] | None = None
    """The newest attempts of all runs, at most 16, the oldest first."""
    adapted: list[str] | None = None
    """Request parameters that Nexus replaced by their nearest equivalent."""
    webhook: WebhookState | None = None
    batch: str | None = None
    """The id of the batch that the job belongs to."""


class JobInput(BaseModel):
    """The request of a job."""

    id: str
    object: Literal["job.input"]
    endpoint: str
    """The endpoint that the request is for."""
    body: dict[str, Any]
    """The request's body; of a form, its fields."""


class JobFields(BaseModel):
    """A job of a list whose request has `fields`: these fields alone."""

    model_config = ConfigDict(extra="allow")


class JobList(BaseModel):
    """A page of jobs, newest first, or in the order that the query asks for. With `fields`, jobs hold only those."""

    object: Literal["list"]
    data: list[Job | JobFields]
    first_id: str | None
    last_id: str | None
    has_more: bool
    next_after: str | None
    """The parameter `after` of the next page. Null: there is none."""


class DeadLetterObject(BaseModel):
    """A job that lost its worker too often or used up its retries."""

    model_config = ConfigDict(title="DeadLetter")

    id: str
    """The id of the job."""
    object: Literal["dead_letter"]
    seq: int
    """The dead letter's sequence number, for the parameter `before`."""
    endpoint: str
    model: str
    capability: Capability
    owner: str
    error: ErrorDetail | None
    run: int
    attempts: int
    worker: str | None
    dead_at: float | None
    """Unix seconds."""
    request_id: str
    metadata: dict[str, str]
    request: Any = None
    """The request, if it is JSON of at most 256 KiB. Lists omit it."""


class DeadLetterList(BaseModel):
    """A page of dead letters, newest first."""

    object: Literal["list"]
    data: list[DeadLetterObject]
    has_more: bool


class DeadLetterDeleted(BaseModel):
    """Confirmation that a dead letter was deleted."""

    id: str
    object: Literal["dead_letter"]
    deleted: Literal[True]


class DeadLetterGroup(BaseModel):
    """Dead letters with one error and one model."""

    object: Literal["dead_letter_group"]
    error: str
    """The code of the error, or its type where it has no code."""
    model: str
    count: int
    teams: int
    """The number of teams that have such dead letters."""
    oldest_at: float
    """Unix seconds."""
    newest_at: float
    newest_id: str
    """The id of the newest one's job."""
    message: str | None
    """The newest one's message."""


class DeadLetterGroupList(BaseModel):
    """The groups of dead letters, the largest first."""

    object: Literal["list"]
    data: list[DeadLetterGroup]
    read: int
    """The number of dead letters that were read."""
    complete: bool
    """Whether these are all dead letters and all groups."""


class BulkError(BaseModel):
    """Why one job was not changed."""

    id: str
    code: str
    message: str


class BulkSummary(BaseModel):
    """What a call has done to many jobs."""

    object: Literal["bulk_result"]
    matched: int
    """The number of jobs that the call tried to change."""
    succeeded: int
    failed: int
    errors: list[BulkError]
    has_more: bool
    """Whether more may match: repeat the call from there."""


class BulkResult(BulkSummary):
    """What a call has done to many jobs."""

    next_after: str | None
    """The `after` of the next call. Null: there is none."""


class DeadLetterResult(BulkSummary):
    """What a call has done to many dead letters."""

    next_before: int | None
    """The `before` of the next call. Null: there is none."""
