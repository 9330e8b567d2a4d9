"""A store without a server: for one process and for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from backbone.store.records import moved
from schemas.errors import Unavailable
from schemas.jobs import JobRecord, JobStatus


class MemoryStore:
    """See `backbone.store.base`. Gateways of one process share one instance."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin empty. `clock` counts seconds."""
        self.available = True
        """Set to False and True again for an outage."""
        self._clock = clock
        self._records: dict[tuple[str, str], tuple[JobRecord, float]] = {}

    async def start(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to close."""

    async def ping(self) -> None:
        """Raises Unavailable during a pretended outage."""
        if not self.available:
            raise Unavailable("the store is away")

    async def create(self, record: JobRecord, *, ttl_s: float) -> bool:
        """Store a new record for `ttl_s` seconds. False, and no change, when it exists."""
        await self.ping()
        self._forget_expired()
        key = (record.owner, record.id)
        if key in self._records:
            return False
        self._records[key] = (record, self._clock() + ttl_s)
        return True

    async def get(self, owner: str, job_id: str) -> JobRecord | None:
        """The record, or None."""
        await self.ping()
        record, expires = self._records.get((owner, job_id), (None, 0.0))
        return record if self._clock() < expires else None

    async def move(self, owner: str, job_id: str, to: JobStatus, **changes: Any) -> JobRecord | None:
        """See the base."""
        record = await self.get(owner, job_id)
        if record is None:
            return None
        new = moved(record, to, changes)
        self._records[owner, job_id] = (new, self._records[owner, job_id][1])
        return new

    def _forget_expired(self) -> None:
        now = self._clock()
        for key in [key for key, (_, expires) in self._records.items() if expires <= now]:
            del self._records[key]
