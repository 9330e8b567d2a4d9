"""What every store does to a record, whatever holds it."""

from __future__ import annotations

from typing import Any

from backbone.store.store import IllegalMove, TimerDelay
from schemas.jobs import LEGAL_TRANSITIONS, TERMINAL_STATUSES, JobRecord, JobStatus

FIXED = frozenset({"id", "owner", "status", "created_at"})
"""Fields that no `changes` may touch."""
OF_A_RUN = frozenset(
    {"attempts", "seq", "started_at", "finished_at", "progress", "worker", "usage", "adapted", "error"}
)
"""Fields that say something about one run: a newer one begins with their defaults."""
_FRESH = {name: JobRecord.model_fields[name].get_default() for name in OF_A_RUN}


def apply_move(record: JobRecord, to: JobStatus, changes: dict[str, Any]) -> JobRecord:
    """The record after a move. Raises IllegalMove; ValueError when `changes` make no record."""
    run = _run_of(record, changes)
    if run < record.run:
        raise IllegalMove(f"job {record.id} is in run {record.run}, not {run} any more")
    newer = run > record.run
    if not (_runs_again(record, to) if newer else _goes_on(record, to)):
        raise IllegalMove(f"job {record.id} cannot go from {record.status} to {to} in run {run}")
    return _changed(record, (_FRESH if newer else {}) | changes | {"status": to})


def apply_update(record: JobRecord, changes: dict[str, Any]) -> JobRecord:
    """The record after an update. Raises IllegalMove; ValueError when `changes` make no record."""
    run = _run_of(record, changes)
    if run != record.run:
        raise IllegalMove(f"job {record.id} is in run {record.run}, not {run}")
    return _changed(record, changes)


def timer_delay_s(record: JobRecord, due_s: TimerDelay) -> float | None:
    """Seconds until the timer of `record` runs out, None for no timer: a job that has ended has none."""
    if callable(due_s):
        due_s = due_s(record)
    return None if due_s is None or record.status in TERMINAL_STATUSES else max(0.0, due_s)


def _goes_on(record: JobRecord, to: JobStatus) -> bool:
    """Whether the record's own run may take it to `to`: what has ended in this run has ended."""
    return record.status not in TERMINAL_STATUSES and to in LEGAL_TRANSITIONS[record.status]


def _runs_again(record: JobRecord, to: JobStatus) -> bool:
    """Whether a newer run may take the record to `to`, by way of QUEUED."""
    queued = JobStatus.QUEUED
    reachable = record.status is queued or queued in LEGAL_TRANSITIONS[record.status]
    return reachable and (to is queued or to in LEGAL_TRANSITIONS[queued])


def _run_of(record: JobRecord, changes: dict[str, Any]) -> int:
    """The run that `changes` are about."""
    wrong = sorted(name for name in changes if name in FIXED or name not in JobRecord.model_fields)
    if wrong:
        raise ValueError(f"a change of a record cannot touch {', '.join(wrong)}")
    run = changes.get("run", record.run)
    if not isinstance(run, int):
        raise ValueError(f"a run is a number, not {run!r}")  # noqa: TRY004 -- one error for changes that make no record
    return run


def _changed(record: JobRecord, changes: dict[str, Any]) -> JobRecord:
    return JobRecord.model_validate(record.model_dump() | changes)
