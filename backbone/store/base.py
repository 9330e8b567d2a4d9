"""The store seam: job records.

Guarantees, for every implementation:
- A record belongs to an owner: another owner's record does not exist.
- `move` is atomic: of two racing moves from one status exactly one succeeds, and only moves in `LEGAL_MOVES` do.
- Each call ends within about two seconds: it raises Unavailable when the store is away, frozen or slow.
"""

from __future__ import annotations

from typing import Any, Protocol

from schemas.jobs import JobRecord, JobStatus


class IllegalMove(Exception):
    """The record is not in a status from which that move is legal."""


class Store(Protocol):
    """See the module's docstring."""

    async def start(self) -> None:
        """Open connections. Does not raise because the store is away."""

    async def close(self) -> None:
        """Close connections."""

    async def ping(self) -> None:
        """One active round trip. Raises Unavailable."""

    async def create(self, record: JobRecord, *, ttl_s: float) -> bool:
        """Store a new record for `ttl_s` seconds. False, and no change, when it exists."""

    async def get(self, owner: str, job_id: str) -> JobRecord | None:
        """The record, or None."""

    async def move(self, owner: str, job_id: str, to: JobStatus, **changes: Any) -> JobRecord | None:
        """Change the status, and the fields in `changes`, by compare-and-set; the TTL stays.

        Returns the new record, None when there is none. Raises IllegalMove.
        """
