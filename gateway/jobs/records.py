"""Pure conversions between job records, outcomes, envelopes and the job object of the API."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any

import orjson

from backbone.store.job_filter import error_code
from gateway import clock
from gateway.jobs.attempt_history import end_with_outcome
from schemas.job_fields import PRIVATE
from schemas.jobs import TERMINAL_STATUSES, Envelope, JobAttempt, JobRecord, JobStatus
from schemas.outcome import Outcome
from schemas.traces import read_trace_context


def now() -> int:
    """Return the time in Unix seconds, by the clock that all gateways share."""
    return int(clock.now())


def id_created_at(job_id: str) -> int | None:
    """Return the creation time of a job id in Unix seconds. None if the id is not a UUIDv7."""
    created_ms = id_created_ms(job_id)
    return None if created_ms is None else created_ms // 1000


def id_created_ms(job_id: str) -> int | None:
    """Return the creation time of a job id in Unix milliseconds. None if the id is not a UUIDv7."""
    number = int(job_id.removeprefix("job_"), 16)
    if number >> 76 & 0xF != 7 or number >> 62 & 0x3 != 2:
        return None
    return number >> 80


def new_record(envelope: Envelope, *, queue_s: float, expires_at: int | None) -> JobRecord:
    """Return the first record of a job."""
    return JobRecord.of(envelope, created_at=now(), expires_at=expires_at, queue_s=queue_s)


def outcome_fields(outcome: Outcome, at: int | None = None) -> dict[str, Any]:
    """Return the record fields, other than the status, that an outcome stored `at` (None: now) sets, as `Store.move` takes them."""
    at = now() if at is None else at
    return {
        "history": partial(end_with_outcome, outcome=outcome, at=at),
        "run": outcome.run,
        "finished_at": at,
        "progress": 1.0 if outcome.status is JobStatus.COMPLETED else None,
        "usage": outcome.usage.model_dump() if outcome.usage is not None else None,
        "error": outcome.error.body()["error"] if outcome.error is not None else None,
        **({"adapted": outcome.adapted} if outcome.adapted else {}),
        **({"worker": outcome.worker, "attempts": outcome.attempts} if outcome.worker else {}),
        **({"started_at": ceil(at - outcome.seconds)} if outcome.seconds is not None else {}),
    }


def record_from_outcome(outcome: Outcome, at: int | None = None) -> JobRecord:
    """Return the record of a job of which only the outcome is known."""
    at = now() if at is None else at
    created_at = id_created_at(outcome.job) or at
    record = JobRecord.of(outcome, created_at=created_at)
    return record.model_copy(update=_fields_of(record, outcome, at))


def with_outcome(record: JobRecord, outcome: Outcome, at: int | None = None) -> JobRecord:
    """Return the record as it will be once the outcome is recorded."""
    if record.status in TERMINAL_STATUSES:
        return record
    return record.model_copy(update=_fields_of(record, outcome, at))


def _fields_of(record: JobRecord, outcome: Outcome, at: int | None) -> dict[str, Any]:
    at = now() if at is None else at
    history = end_with_outcome(record, outcome, at)
    return {**outcome_fields(outcome, at), "status": outcome.status, "history": history}


def queue_deadline(record: JobRecord) -> float:
    """Return when a waiting job reaches its queue limit, in Unix seconds."""
    return (record.queued_at or record.created_at) + record.queue_s


def seconds_until_due(record: JobRecord, status: JobStatus, silence_s: float) -> float:
    """Return the seconds until a gateway must check the job again, given its next `status`.

    A waiting job is due at its queue limit, which restarts if the job was not waiting before. A running job is due after
    `silence_s`; each heartbeat of its attempt extends that.
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
    """Return the API's job object. Unknown positions and estimates are null."""
    out: dict[str, Any] = {
        "id": record.job,
        "object": "job",
        "endpoint": record.endpoint,
        "capability": record.capability,
        "model": record.public_model,
        "service_tier": record.lane,
        "status": record.status,
        "created_at": record.created_at,
        "queued_at": record.queued_at or record.created_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "expires_at": record.expires_at,
        "run": record.run,
        "attempts": record.attempts,
        "queue_position": position,
        "eta_seconds": eta_s,
        "progress": record.progress,
        "worker": record.worker,
        "key": record.key or None,
        "request_id": record.request_id or None,
        "usage": record.usage,
        "error": record.error,
        "metadata": record.metadata,
        "result_url": f"/v1/jobs/{record.job}/result",
        "events_url": f"/v1/jobs/{record.job}/events",
    }
    if record.history:
        out["attempts_detail"] = [attempt_object(attempt) for attempt in record.history]
    if record.adapted:
        out["adapted"] = list(record.adapted)
    if record.webhook_state is not None:
        out["webhook"] = record.webhook_state.model_dump(mode="json")
    if record.batch:
        out["batch"] = record.batch
    if record.traceparent and (trace := read_trace_context(record.traceparent)) is not None:
        out["trace_id"] = trace.trace_id
    return out


def attempt_object(attempt: JobAttempt) -> dict[str, Any]:
    """Return the API's object for an attempt."""
    return {
        "run": attempt.run,
        "number": attempt.number,
        "worker": attempt.worker,
        "started_at": attempt.started_ms / 1000,
        "first_output_at": None if attempt.first_output_ms is None else attempt.first_output_ms / 1000,
        "ended_at": None if attempt.ended_ms is None else attempt.ended_ms / 1000,
        "end": attempt.end,
        "code": attempt.code,
    }


def job_state_object(record: JobRecord) -> dict[str, Any]:
    """Return the job object for operators: its state and its team, without what the caller wrote."""
    state = {name: value for name, value in job_object(record).items() if name not in PRIVATE}
    return state | {"team": record.owner, "error_code": error_code(record)}


def job_json(record: JobRecord) -> bytes:
    """Return the API's job object as JSON, for events: without the attempts, which a reader that follows live does not know."""
    job = job_object(record)
    job.pop("attempts_detail", None)
    return orjson.dumps(job)
