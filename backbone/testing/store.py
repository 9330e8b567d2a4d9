"""Implement the store in memory, for one process and for tests."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from backbone.store.job_filter import JobFilter
from backbone.store.record_changes import apply_move, apply_update, timer_delay_s
from backbone.store.store import (
    CLAIMED_TIMER_S,
    SERVICE_TIME_WEIGHT,
    DueJob,
    FoundJobs,
    JobLimit,
    LimitReached,
    Store,
    TimerDelay,
)
from schemas.errors import Unavailable
from schemas.jobs import TERMINAL_STATUSES, JobRecord, JobStatus


async def list_jobs(store: Store, owner: str, *, after: str = "", limit: int = 100) -> list[JobRecord]:
    """Return an owner's records, newest first."""
    return (await store.search([owner], JobFilter(), after=after, limit=limit)).records


class _Lease(NamedTuple):
    token: str
    expires: float


class MemoryStore:
    """Job records, timers and leases: see `backbone.store.store`. Gateways of one process share one instance.

    No method awaits anything between its first look and its last change: that makes each one atomic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create an empty store. `clock` returns seconds."""
        self.available = True
        """Set it to False to simulate an outage."""
        self._clock = clock
        self._records: dict[DueJob, JobRecord] = {}
        self._expires: dict[DueJob, float] = {}
        self._expiries: list[tuple[float, DueJob]] = []
        """A heap; holds entries of records that were removed before their time, too."""
        self._timers: dict[DueJob, float] = {}
        self._leases: dict[str, _Lease] = {}
        self._service: dict[tuple[str, str], float] = {}

    async def start(self) -> None:
        """Do nothing: there is no connection to open."""

    async def close(self) -> None:
        """Do nothing: there is no connection to close."""

    async def ping(self) -> None:
        """Raise Unavailable while `available` is False."""
        if not self.available:
            raise Unavailable("The memory store is away.")

    async def check_write(self) -> None:
        """Raise as `ping` does."""
        await self.ping()

    async def create(
        self, record: JobRecord, *, ttl_s: float, due_s: float | None = None, max_queued: JobLimit | None = None
    ) -> bool:
        await self._expire()
        name = DueJob(record.owner, record.job)
        if name in self._records:
            return False
        self._require_room(record, JobStatus.QUEUED, max_queued)
        self._records[name] = record
        self._expires[name] = self._clock() + ttl_s
        heapq.heappush(self._expiries, (self._expires[name], name))
        self._set_timer(name, timer_delay_s(record, due_s))
        return True

    async def get(self, owner: str, job_id: str) -> JobRecord | None:
        await self._expire()
        return self._records.get(DueJob(owner, job_id))

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
        record = await self.get(owner, job_id)
        if record is None:
            return None
        new = apply_move(record, to, changes)
        begins = to is JobStatus.IN_PROGRESS and record.status is not to
        if begins:
            self._require_room(record, to, max_running)
        name = DueJob(owner, job_id)
        self._records[name] = new
        self._set_timer(name, timer_delay_s(new, due_s))
        return new

    async def update(self, owner: str, job_id: str, *, due_s: TimerDelay = None, **changes: Any) -> JobRecord | None:
        record = await self.get(owner, job_id)
        if record is None:
            return None
        name = DueJob(owner, job_id)
        new = self._records[name] = apply_update(record, changes)
        after_s = timer_delay_s(new, due_s)
        if after_s is not None:
            self._set_timer(name, after_s)
        return new

    async def remove(self, owner: str, job_id: str) -> None:
        await self._expire()
        self._delete(DueJob(owner, job_id))

    async def search(
        self,
        owners: Sequence[str] | None,
        wanted: JobFilter,
        *,
        after: str = "",
        limit: int = 100,
        newest_first: bool = True,
    ) -> FoundJobs:
        await self._expire()
        found = [
            record
            for name, record in self._records.items()
            if (owners is None or name.owner in owners) and not record.batch and wanted.matches(record)
        ]
        found.sort(key=lambda record: record.job, reverse=newest_first)
        if after:
            found = [record for record in found if (record.job < after if newest_first else record.job > after)]
        return FoundJobs(found[:limit], found[limit - 1].job if len(found) > limit else "")

    async def select(self, owner: str, job_ids: Iterable[str], wanted: JobFilter) -> list[JobRecord]:
        await self._expire()
        found = (self._records.get(DueJob(owner, job_id)) for job_id in job_ids)
        return [record for record in found if record is not None and wanted.matches(record)]

    async def count_running(self, key: str) -> int:
        await self._expire()
        return self._count(key, JobStatus.IN_PROGRESS)

    async def count_queued(self, key: str) -> int:
        await self._expire()
        return self._count(key, JobStatus.QUEUED)

    async def open_jobs(self, key: str) -> list[DueJob]:
        await self._expire()
        return [
            name
            for name, record in self._records.items()
            if record.key == key and record.status not in TERMINAL_STATUSES
        ]

    async def claim_due(self, limit: int) -> list[DueJob]:
        await self._expire()
        now = self._clock()
        late = heapq.nsmallest(limit, ((at, name) for name, at in self._timers.items() if at <= now))
        for _, name in late:
            self._timers[name] = now + CLAIMED_TIMER_S
        return [name for _, name in late]

    async def acquire_lease(self, job_id: str, token: str, seconds: float) -> bool:
        await self.ping()
        now = self._clock()
        self._leases = {job: lease for job, lease in self._leases.items() if lease.expires > now}
        if self._leases.get(job_id, _Lease(token, now)).token != token:
            return False
        self._leases[job_id] = _Lease(token, now + seconds)
        return True

    async def release_lease(self, job_id: str, token: str) -> None:
        await self.ping()
        lease = self._leases.get(job_id)
        if lease is not None and lease.token == token:
            del self._leases[job_id]

    async def record_service_time(self, capability: str, model: str, seconds: float) -> None:
        await self.ping()
        name = (capability, model)
        mean = self._service.get(name, seconds)
        self._service[name] = mean + (seconds - mean) * SERVICE_TIME_WEIGHT

    async def mean_service_time_s(self, capability: str, model: str) -> float | None:
        await self.ping()
        return self._service.get((capability, model))

    async def _expire(self) -> None:
        """Delete the records that have expired. Raises Unavailable."""
        await self.ping()
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            at, name = heapq.heappop(self._expiries)
            if self._expires.get(name) == at:
                self._delete(name)

    def _delete(self, name: DueJob) -> None:
        for entries in (self._records, self._expires, self._timers):
            entries.pop(name, None)

    def _set_timer(self, name: DueJob, after_s: float | None) -> None:
        if after_s is None:
            self._timers.pop(name, None)
        else:
            self._timers[name] = self._clock() + after_s

    def _require_room(self, record: JobRecord, status: JobStatus, limit: JobLimit | None) -> None:
        """Raise LimitReached if the record's key or owner has as many jobs in `status` as it may have."""
        key, owner = limit or JobLimit()
        if key is not None and self._count(record.key, status) >= key:
            raise LimitReached("key")
        of_owner = (one for one in self._records.values() if one.owner == record.owner and one.status is status)
        if owner is not None and sum(1 for _ in of_owner) >= owner:
            raise LimitReached("owner")

    def _count(self, key: str, status: JobStatus) -> int:
        return sum(record.key == key and record.status is status for record in self._records.values())
