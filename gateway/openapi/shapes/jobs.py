"""Describe jobs and dead letters."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from gateway.openapi.shapes.errors import ErrorDetail
from schemas.jobs import Capability, JobStatus, Lane, WebhookState


class Job(BaseModel):
    """A request that is answered later."""

    id: str
    object: Literal["job"]
    endpoint: str
    """The endpoint that answers it."""
    model: str
    service_tier: Lane
    """The lane that it waits in."""
    status: JobStatus
    created_at: int
    """Unix seconds, as are all times here."""
    started_at: int | None
    """When its newest attempt began."""
    finished_at: int | None
    expires_at: int | None
    """When it ends as `expired` if it has not ended before."""
    run: int
    """1, and one more with each retry."""
    attempts: int
    """Attempts of this run so far."""
    queue_position: int | None
    """How many jobs wait before it."""
    eta_seconds: float | None
    """In how many seconds it may have ended, where that can be estimated."""
    progress: float | None
    """From 0 to 1, where the server tells."""
    worker: str | None
    """The worker that runs it, or ran it last."""
    usage: dict[str, Any] | None
    error: ErrorDetail | None
    """Why it failed."""
    metadata: dict[str, str]
    result_url: str
    events_url: str
    adapted: list[str] | None = None
    """Parameters that were replaced by their nearest equivalent."""
    webhook: WebhookState | None = None
    batch: str | None = None
    """The batch that it belongs to."""


class JobList(BaseModel):
    """A page of jobs, the newest first. The next page is behind `last_id`."""

    object: Literal["list"]
    data: list[Job]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeadLetter(BaseModel):
    """A job that killed its workers or used up its retries."""

    id: str
    """The job's id."""
    object: Literal["dead_letter"]
    seq: int
    """Its place among the dead letters: `before` takes it."""
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
    """The request, where it is JSON of at most 256 KiB. Not in lists."""


class DeadLetterList(BaseModel):
    """A page of dead letters, the newest first."""

    object: Literal["list"]
    data: list[DeadLetter]
    has_more: bool


class DeadLetterDeleted(BaseModel):
    """A dead letter was deleted."""

    id: str
    object: Literal["dead_letter"]
    deleted: Literal[True]
