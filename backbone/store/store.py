"""The store protocol: job records, and the counts and timers beside them.

Guarantees of every implementation:
- A record belongs to an owner: another owner's record does not exist.
- `move` is atomic: of two racing moves from one status exactly one succeeds, and only moves in `LEGAL_MOVES` do. The store's
  counts (open jobs of a key, timers, the list of an owner's jobs) change in the same step.
- A move of an older run than the record's never succeeds (IllegalMove), nor does one of the same run after it has ended. A move
  of a newer run goes by way of QUEUED, from every status from which the job can run again, and begins without the data of the
  old run (`record_changes.OF_A_RUN`).
- Each call ends within about two seconds: it raises Unavailable when the store is away, frozen or slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from backbone.store.job_filter import JobFilter
from schemas.jobs import JobRecord, JobStatus

CLAIMED_TIMER_S = 30.0
"""A claimed timer is set to this time, after which another caller may claim it, unless the job moves before."""
SERVICE_TIME_WEIGHT = 0.2
"""The weight of the newest job in the mean of service times."""


class IllegalMove(Exception):
    """The record is not in a status from which this move is legal."""


class JobLimit(NamedTuple):
    """How many jobs may be in one status at the same time. None: any number."""

    key: int | None = None
    """Jobs of one API key."""
    owner: int | None = None
    """Jobs of one owner, over all keys."""


class LimitReached(Exception):
    """The key, or its owner, has as many queued or running jobs as it may have. The message says which."""


class DueJob(NamedTuple):
    """A job whose timer has expired."""

    owner: str
    job: str


class FoundJobs(NamedTuple):
    """What a search has found."""

    records: list[JobRecord]
    after: str
    """The id after which the search goes on. Empty: it has seen all records."""


TimerDelay = float | Callable[[JobRecord], float] | None
"""Seconds until a timer expires, or a function that returns them for the new record."""


class Store(Protocol):
    """Stores job records; see the module's docstring for the guarantees."""

    async def start(self) -> None:
        """Open connections. Does not raise because the store is away."""

    async def close(self) -> None:
        """Close connections."""

    async def ping(self) -> None:
        """Make one round trip. Raises Unavailable."""

    async def check_write(self) -> None:
        """Write a small value with a short lifetime. Raises Unavailable with the reason."""

    async def create(
        self, record: JobRecord, *, ttl_s: float, due_s: float | None = None, max_queued: JobLimit | None = None
    ) -> bool:
        """Store a new record for `ttl_s` seconds, and set its timer to `due_s` seconds from now. False, without a change: it
        exists.

        Raises LimitReached, without a change, when `max_queued` jobs of `record.key` or `record.owner` are in status QUEUED.
        """

    async def get(self, owner: str, job_id: str) -> JobRecord | None:
        """Return the record; None: it does not exist."""

    async def move(
        self,
        owner: str,
        job_id: str,
        to: JobStatus,
        *,
        due_s: TimerDelay = None,
        max_running: JobLimit | None = None,
        **changes: Any,
    ) -> JobRecord | None:
        """Change the status, and the fields in `changes`, by compare-and-set; the TTL stays. Returns the new record; None: it
        does not exist.

        `run` in `changes` is the run that moves; by default the record's own. The timer is set to `due_s` seconds from now, or
        removed where that is None or `to` is terminal. Raises IllegalMove; LimitReached, without a change, when the job does
        not run yet and `max_running` jobs of its key or owner are in status IN_PROGRESS; ValueError for invalid `changes`.

        `history` in `changes` may be a function that returns it for the record before the move.
        """

    async def update(self, owner: str, job_id: str, *, due_s: TimerDelay = None, **changes: Any) -> JobRecord | None:
        """Change fields other than the status, by compare-and-set. Returns the new record; None: it does not exist.

        `due_s` sets the timer of a job that is not terminal, or sealed; None leaves it. Raises IllegalMove where `run` is in `changes` and
        is not the record's, ValueError for invalid `changes`.
        """

    async def remove(self, owner: str, job_id: str) -> None:
        """Delete a record and its counts. Idempotent."""

    async def search(
        self,
        owners: Sequence[str] | None,
        wanted: JobFilter,
        *,
        after: str = "",
        limit: int = 100,
        newest_first: bool = True,
    ) -> FoundJobs:
        """Return records of these owners (None: of all) that meet the filter, in the order of their ids, after the id `after`.

        It ends at `limit` records, or after about two seconds: `FoundJobs.after` says where to go on. Jobs of batch lines are
        not found. Raises InvalidRequest for more owners than one search can merge.
        """

    async def select(self, owner: str, job_ids: Iterable[str], wanted: JobFilter) -> list[JobRecord]:
        """Return those of at most some hundred records of an owner that exist and meet the filter, in the order of `job_ids`."""

    async def count_running(self, key: str) -> int:
        """Return the number of this API key's jobs in status IN_PROGRESS."""

    async def count_queued(self, key: str) -> int:
        """Return the number of this API key's jobs in status QUEUED."""

    async def open_jobs(self, key: str) -> list[DueJob]:
        """Return this API key's jobs in status QUEUED or IN_PROGRESS, also those of batch lines."""

    # Timers

    async def claim_due(self, limit: int) -> list[DueJob]:
        """Return jobs whose timers have expired, each to one caller: its timer is set to `CLAIMED_TIMER_S` from now."""

    # Leases of attempts

    async def acquire_lease(self, job_id: str, token: str, seconds: float) -> bool:
        """Let the attempt `token` run the job for `seconds` from now. False: another attempt holds the lease."""

    async def release_lease(self, job_id: str, token: str) -> None:
        """Release the lease of an attempt that has ended. Does nothing when the attempt does not hold it."""

    # Service times

    async def record_service_time(self, capability: str, model: str, seconds: float) -> None:
        """Record how long a job took from its start to its end."""

    async def mean_service_time_s(self, capability: str, model: str) -> float | None:
        """Return the exponentially weighted mean of recent jobs' service times, in which each new one counts a fifth; None:
        unknown.
        """
