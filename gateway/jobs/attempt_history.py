"""Keeps the attempts of a job in its record, with the writes that its states cause anyway.

Each function returns the attempts after a change, from the record before it: the store may have to try a change again.
"""

from __future__ import annotations

from gateway import clock
from schemas.jobs import MAX_ATTEMPTS_KEPT, JobAttempt, JobRecord
from schemas.outcome import Outcome

History = tuple[JobAttempt, ...]

RETURNED, WORKER_LOST = "returned", "worker_lost"
"""Ends of attempts after which the job waits again. All other ends are statuses of the job."""


def now_ms() -> int:
    """Return the time in Unix milliseconds, by the clock that all gateways share."""
    return int(clock.now() * 1000)


def begin_attempt(record: JobRecord, run: int, number: int, worker: str, at_ms: int) -> History:
    """Add an attempt. One that still seems to run has lost its worker. A start that is reported again changes nothing."""
    running = _running(record.history)
    if running is not None and (running.run, running.number, running.worker) == (run, number, worker):
        return record.history
    ended = end_attempt(record, WORKER_LOST, at_ms)
    return (*ended, JobAttempt(run=run, number=number, worker=worker, started_ms=at_ms))[-MAX_ATTEMPTS_KEPT:]


def end_attempt(record: JobRecord, end: str, at_ms: int, code: str | None = None) -> History:
    """End the attempt that runs, if one does."""
    running = _running(record.history)
    if running is None:
        return record.history
    ended = running.model_copy(update={"end": end, "code": code, "ended_ms": max(at_ms, running.started_ms)})
    return (*record.history[:-1], ended)


def end_with_outcome(record: JobRecord, outcome: Outcome, at: int) -> History:
    """End the attempt that an outcome, stored `at` (Unix seconds), belongs to, or any that runs where a gateway decided it."""
    code = (outcome.error.code or outcome.error.type) if outcome.error is not None else None
    if outcome.token and not outcome.events:  # it never began: the one before it was the last that the job was granted
        return end_attempt(record, WORKER_LOST, at * 1000)
    if outcome.seconds is None or not outcome.worker:
        return end_attempt(record, outcome.status.value, at * 1000, code)
    running = _running(record.history)
    history, seconds = record.history, max(0.0, outcome.seconds)
    if running is None or (running.run, running.worker) != (outcome.run, outcome.worker):
        started_ms = at * 1000 - round(seconds * 1000)
        history = begin_attempt(record, outcome.run, max(1, outcome.attempts), outcome.worker, started_ms)
    last = history[-1]
    first_s = outcome.first_output_s
    update = {
        "ended_ms": last.started_ms + round(seconds * 1000),
        "end": outcome.status.value,
        "code": code,
        "first_output_ms": None if first_s is None else last.started_ms + round(min(max(0.0, first_s), seconds) * 1000),
    }
    return (*history[:-1], last.model_copy(update=update))


def _running(history: History) -> JobAttempt | None:
    return history[-1] if history and history[-1].end is None else None
