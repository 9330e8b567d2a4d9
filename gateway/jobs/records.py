"""How records, words and envelopes become one another. Pure."""

from __future__ import annotations

from math import ceil
from typing import Any

import orjson

from gateway import clock
from schemas.errors import ErrorInfo
from schemas.jobs import TERMINAL_STATUSES, Envelope, JobRecord, JobStatus, WebhookState
from schemas.outcome import Outcome


def now() -> int:
    """Unix seconds, by the clock of all gateways."""
    return int(clock.now())


def id_created_at(job_id: str) -> int | None:
    """When an id was made, in Unix seconds: ids are UUIDv7. None for ids that follow from something else."""
    number = int(job_id.removeprefix("job_"), 16)
    if number >> 76 & 0xF != 7 or number >> 62 & 0x3 != 2:
        return None
    return (number >> 80) // 1000


def new_record(envelope: Envelope, *, queue_s: float, expires_at: int | None) -> JobRecord:
    """What a job's record begins as."""
    return JobRecord(
        id=envelope.job,
        owner=envelope.owner,
        endpoint=envelope.shown_endpoint or envelope.endpoint,
        model=envelope.public_model,
        capability=envelope.capability,
        queue_model=envelope.model,
        service_tier=envelope.lane,
        run=envelope.run,
        created_at=now(),
        expires_at=expires_at,
        metadata=envelope.metadata,
        key=envelope.key,
        request_id=envelope.request_id,
        stream=envelope.stream,
        queue_s=queue_s,
        batch=envelope.batch,
        uploads=envelope.own_blobs,
        webhook=WebhookState(url=envelope.webhook) if envelope.webhook else None,
    )


def outcome_fields(word: Outcome, at: int | None = None) -> dict[str, Any]:
    """What a terminal word that was stored `at` (None: just now) changes in a record, beside its status."""
    at = now() if at is None else at
    return {
        "run": word.run,
        "finished_at": at,
        "progress": 1.0 if word.status is JobStatus.COMPLETED else None,
        "usage": word.usage.model_dump() if word.usage is not None else None,
        "error": word.error.body()["error"] if word.error is not None else None,
        **({"adapted": word.adapted} if word.adapted else {}),
        **({"worker": word.worker, "attempts": word.attempts} if word.worker else {}),
        **({"started_at": ceil(at - word.seconds)} if word.seconds is not None else {}),
    }


def record_from_outcome(word: Outcome, at: int | None = None) -> JobRecord:
    """The record of a job that is known by its terminal word alone."""
    at = now() if at is None else at
    return JobRecord(
        id=word.job,
        owner=word.owner,
        endpoint=word.endpoint,
        model=word.public_model,
        capability=word.capability,
        queue_model=word.model,
        service_tier=word.lane,
        status=word.status,
        created_at=id_created_at(word.job) or at,
        metadata=word.metadata,
        key=word.key,
        request_id=word.request_id,
        stream=word.stream,
        batch=word.batch,
        uploads=word.uploads,
        webhook=WebhookState(url=word.webhook) if word.webhook else None,
        **outcome_fields(word, at),
    )


def with_outcome(record: JobRecord, word: Outcome, at: int | None = None) -> JobRecord:
    """The record as it will stand once the word is recorded."""
    if record.status in TERMINAL_STATUSES:
        return record
    return record.model_copy(update={"status": word.status, **outcome_fields(word, at)})


def gateway_outcome(record: JobRecord, status: JobStatus, error: ErrorInfo | None = None) -> Outcome:
    """A terminal word that no attempt says: cancelled, expired."""
    return Outcome(
        job=record.id,
        run=record.run,
        status=status,
        owner=record.owner,
        endpoint=record.endpoint,
        capability=record.capability,
        lane=record.service_tier,
        model=record.queue_name,
        public_model=record.model,
        request_id=record.request_id,
        metadata=record.metadata,
        key=record.key,
        webhook=record.webhook.url if record.webhook is not None else "",
        batch=record.batch,
        stream=record.stream,
        uploads=record.uploads,
        error=error,
    )


def queue_deadline(record: JobRecord) -> float:
    """When a waiting job has waited too long, in Unix seconds."""
    return (record.queued_at or record.created_at) + record.queue_s


def seconds_until_due(record: JobRecord, status: JobStatus, silence_s: float) -> float:
    """Seconds until somebody should look at the job again, which is then in `status`.

    Waiting: until its time to wait is over, which begins anew where it did not wait before. Running: until `silence_s`
    without a sign of it, which renews this.
    """
    at = now()
    if status is not JobStatus.QUEUED:
        seconds = silence_s
    else:
        seconds = queue_deadline(record) - at if record.status is JobStatus.QUEUED else record.queue_s
    if record.expires_at is not None:
        seconds = min(seconds, record.expires_at - at)
    return max(0.0, seconds)


def job_object(record: JobRecord, *, position: int | None = None, eta_s: float | None = None) -> dict[str, Any]:
    """The job object. `eta_seconds` is null where nothing is known about it."""
    out: dict[str, Any] = {
        "id": record.id,
        "object": "job",
        "endpoint": record.endpoint,
        "model": record.model,
        "service_tier": record.service_tier,
        "status": record.status,
        "created_at": record.created_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "expires_at": record.expires_at,
        "run": record.run,
        "attempts": record.attempts,
        "queue_position": position,
        "eta_seconds": eta_s,
        "progress": record.progress,
        "worker": record.worker,
        "usage": record.usage,
        "error": record.error,
        "metadata": record.metadata,
        "result_url": f"/v1/jobs/{record.id}/result",
        "events_url": f"/v1/jobs/{record.id}/events",
    }
    if record.adapted:
        out["adapted"] = list(record.adapted)
    if record.webhook is not None:
        out["webhook"] = record.webhook.model_dump(mode="json")
    if record.batch:
        out["batch"] = record.batch
    return out


def job_json(record: JobRecord) -> bytes:
    """The same, as JSON."""
    return orjson.dumps(job_object(record))
