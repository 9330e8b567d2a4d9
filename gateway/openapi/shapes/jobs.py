"""The response bodies of `/v1/jobs` and `/v1/dlq`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from gateway.openapi.shapes.errors import ErrorDetail
from schemas.jobs import Capability, JobStatus, Lane, WebhookState


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
    adapted: list[str] | None = None
    """Request parameters that Nexus replaced by their nearest equivalent."""
    webhook: WebhookState | None = None
    batch: str | None = None
    """The id of the batch that the job belongs to."""


class JobList(BaseModel):
    """A page of jobs, newest first, or in the order that the query asks for. With `fields`, jobs hold only those."""

    object: Literal["list"]
    data: list[Job]
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
