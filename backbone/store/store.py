"""The store seam: job records, and what is counted and timed beside them.

Guarantees, for every implementation:
- A record belongs to an owner: another owner's record does not exist.
- `move` is atomic: of two racing moves from one status exactly one succeeds, and only moves in `LEGAL_MOVES` do. What the store
  counts (open jobs of a key, timers, the list of an owner's jobs) changes in the same step.
- A move of an older run than the record's never succeeds (IllegalMove), nor one of its own run when that has ended; one of a
  newer run goes by way of QUEUED, from every status from which the job can run again, and begins without what the old run left
  behind (`records.OF_A_RUN`).
- Each call ends within about two seconds: it raises Unavailable when the store is away, frozen or slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from schemas.jobs import JobRecord, JobStatus

CLAIMED_TIMER_S = 30.0
"""A job whose timer was given to a caller is given out again after this time, unless the caller moves it."""
SERVICE_TIME_WEIGHT = 0.2
"""The weight of the newest job in the mean of service times."""


class IllegalMove(Exception):
    """The record is not in a status from which that move is legal."""


class LimitReached(Exception):
    """The key has as many jobs waiting, or running, as it may have."""


class DueJob(NamedTuple):
    """A job whose timer has run out."""

    owner: str
    job: str


TimerDelay = float | Callable[[JobRecord], float] | None
"""Seconds until a timer runs out, or what makes them of the new record."""


class Store(Protocol):
    """See the module's docstring."""

    async def start(self) -> None:
        """Open connections. Does not raise because the store is away."""

    async def close(self) -> None:
        """Close connections."""

    async def ping(self) -> None:
        """One active round trip. Raises Unavailable."""

    async def check_write(self) -> None:
        """Write something small, which is gone again soon. Raises Unavailable, which says what hinders it."""

    async def create(
        self, record: JobRecord, *, ttl_s: float, due_s: float | None = None, max_queued: int | None = None
    ) -> bool:
        """Store a new record for `ttl_s` seconds, and set its timer to `due_s` seconds from now. False, and no change,
        when it exists. Raises LimitReached, without a change, when `record.key` has `max_queued` jobs in status QUEUED.
        """

    async def get(self, owner: str, job_id: str) -> JobRecord | None:
        """The record, or None."""

    async def move(
        self,
        owner: str,
        job_id: str,
        to: JobStatus,
        *,
        due_s: TimerDelay = None,
        max_running: int | None = None,
        **changes: Any,
    ) -> JobRecord | None:
        """Change the status, and the fields in `changes`, by compare-and-set; the TTL stays.

        `run` in `changes` says which run moves; without it the record's own does.
        The timer is set to `due_s` seconds from now, or removed where that is None or `to` is terminal.
        Returns the new record, None when there is none. Raises IllegalMove; LimitReached, without a change, when the job does
        not run yet and its key has `max_running` jobs in status IN_PROGRESS; ValueError when `changes` make no record.
        """

    async def update(self, owner: str, job_id: str, *, due_s: TimerDelay = None, **changes: Any) -> JobRecord | None:
        """Change fields other than the status, by compare-and-set. `due_s` sets the timer of a job that is not terminal;
        None leaves it. Returns the new record, None when there is none. Raises IllegalMove where `run` is in `changes` and
        is not the record's, ValueError when `changes` make no record.
        """

    async def remove(self, owner: str, job_id: str) -> None:
        """Forget a record and what is counted about it. Idempotent."""

    async def page(self, owner: str, *, after: str = "", limit: int = 100) -> list[JobRecord]:
        """Up to `limit` records of `owner` with ids below `after`, newest first. Records that have expired are left out, so
        that fewer than `limit` does not mean the end unless it is empty; those of a batch's lines are in no list.
        """

    async def count_running(self, key: str) -> int:
        """Jobs of this API key in status IN_PROGRESS."""

    async def count_queued(self, key: str) -> int:
        """Jobs of this API key in status QUEUED."""

    # Timers

    async def claim_due(self, limit: int) -> list[DueJob]:
        """Jobs whose timers have run out, each given to one caller: its timer is set to `RETRY_DUE_S` from now."""

    # Leases of attempts

    async def acquire_lease(self, job_id: str, token: str, seconds: float) -> bool:
        """The attempt `token` runs the job for `seconds` from now. False: another attempt holds the lease."""

    async def release_lease(self, job_id: str, token: str) -> None:
        """The attempt has ended. Nothing happens when it does not hold the lease."""

    # Service times

    async def record_service_time(self, capability: str, model: str, seconds: float) -> None:
        """A job took this long from its start to its end."""

    async def mean_service_time_s(self, capability: str, model: str) -> float | None:
        """What jobs took lately (an exponentially weighted mean, each new one counting a fifth); None: not known."""
