"""Changes of a job record, as every store makes them."""

from __future__ import annotations

from typing import Any

from backbone.store.store import IllegalMove, TimerDelay
from schemas.jobs import LEGAL_TRANSITIONS, TERMINAL_STATUSES, JobRecord, JobStatus

FIXED = frozenset({"job", "owner", "status", "created_at"})
"""Fields that `changes` may not hold."""
OF_A_RUN = frozenset(
    {
        "attempts",
        "seq",
        "started_at",
        "finished_at",
        "progress",
        "worker",
        "usage",
        "adapted",
        "error",
        "reserved_tokens",
    }
)
"""Fields about one run: a newer run begins with their defaults."""
_FRESH = {name: JobRecord.model_fields[name].get_default() for name in OF_A_RUN}


def apply_move(record: JobRecord, to: JobStatus, changes: dict[str, Any]) -> JobRecord:
    """Return the record after a move. Raises IllegalMove; ValueError for invalid `changes`."""
    run = _run_of(record, changes)
    if run < record.run:
        raise IllegalMove(f"job {record.job} is in run {record.run}; run {run} has ended")
    newer = run > record.run
    if not (_runs_again(record, to) if newer else _goes_on(record, to)):
        raise IllegalMove(f"job {record.job} cannot go from {record.status} to {to} in run {run}")
    return _changed(record, (_FRESH if newer else {}) | changes | {"status": to})


def apply_update(record: JobRecord, changes: dict[str, Any]) -> JobRecord:
    """Return the record after an update. Raises IllegalMove; ValueError for invalid `changes`."""
    run = _run_of(record, changes)
    if run != record.run:
        raise IllegalMove(f"job {record.job} is in run {record.run}, not {run}")
    return _changed(record, changes)


def timer_delay_s(record: JobRecord, due_s: TimerDelay) -> float | None:
    """Return the seconds until the record's timer expires; None for no timer: a job that has ended has none, unless it is sealed."""
    if callable(due_s):
        due_s = due_s(record)
    return None if due_s is None or (record.status in TERMINAL_STATUSES and not record.sealed) else max(0.0, due_s)


def _goes_on(record: JobRecord, to: JobStatus) -> bool:
    """Return whether the record's own run may move to `to`: a run that has ended stays ended."""
    return record.status not in TERMINAL_STATUSES and to in LEGAL_TRANSITIONS[record.status]


def _runs_again(record: JobRecord, to: JobStatus) -> bool:
    """Return whether a newer run may move the record to `to`, by way of QUEUED."""
    queued = JobStatus.QUEUED
    reachable = record.status is queued or queued in LEGAL_TRANSITIONS[record.status]
    return reachable and (to is queued or to in LEGAL_TRANSITIONS[queued])


def _run_of(record: JobRecord, changes: dict[str, Any]) -> int:
    """Return the run that `changes` belong to."""
    wrong = sorted(name for name in changes if name in FIXED or name not in JobRecord.model_fields)
    if wrong:
        raise ValueError(f"these fields of a record cannot be changed: {', '.join(wrong)}")
    run = changes.get("run", record.run)
    if not isinstance(run, int):
        raise ValueError(f"run must be an integer, not {run!r}")  # noqa: TRY004 -- one error for changes that make no record
    return run


def _changed(record: JobRecord, changes: dict[str, Any]) -> JobRecord:
    history = changes.get("history")
    if callable(history):
        changes = changes | {"history": history(record)}
    return JobRecord.model_validate(record.__dict__ | changes)
