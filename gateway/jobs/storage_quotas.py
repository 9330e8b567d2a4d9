"""Bound what the jobs of each owner keep stored: request bodies in blobs, and results.

Above its bytes of results, a team's own oldest results are deleted, so that they never take the room of other teams' results.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from backbone.bus.blobs import BlobStore
from backbone.bus.job_log import OutcomeStore
from backbone.store.byte_quotas import ByteQuotas
from gateway.http.body_storage import stored_item
from gateway.limits.effective import EffectiveLimits
from schemas.jobs import JobStatus
from schemas.outcome import Outcome

log = structlog.get_logger(__name__)

MAX_DROPPED = 64
"""Results that are deleted for one new result at most; the next one goes on."""
OVERHEAD_BYTES = 1024
"""Bytes that a stored result takes beside the answer."""


class JobStorageQuotas:
    """Counts the stored bodies and results of jobs by owner. Raises Unavailable while Redis or NATS is away."""

    def __init__(
        self,
        bodies: ByteQuotas,
        results: ByteQuotas,
        outcomes: OutcomeStore,
        blobs: BlobStore,
        limits: Callable[[str], EffectiveLimits],
        *,
        keep_s: float,
    ) -> None:
        """`limits` returns the limits of an API key, by its id. `keep_s`: the lifetime of results."""
        self._bodies = bodies
        self._results = results
        self._outcomes = outcomes
        self._blobs = blobs
        self._limits = limits
        self._keep_s = keep_s

    async def release_bodies(self, outcome: Outcome) -> None:
        """Count the bodies of an ended job no more."""
        for name in outcome.uploads:
            await self._bodies.release(outcome.owner, stored_item(name))

    async def count_result(self, outcome: Outcome) -> None:
        """Count a job's result, and delete the oldest results of an owner that has too many bytes. Idempotent."""
        most = self._limits(outcome.key).result_bytes if outcome.key else None
        if most is None or outcome.status is not JobStatus.COMPLETED or outcome.batch:
            return  # a batch's results become files, which have a limit of their own
        owner, size = outcome.owner, outcome.size + OVERHEAD_BYTES
        await self._results.reserve(owner, outcome.job, size, ttl_s=self._keep_s, most=None)
        dropped = await self._results.oldest(owner, most, MAX_DROPPED)
        for job in dropped:
            await self._drop(owner, job)
        if dropped:
            log.warning("results.dropped", owner=owner, results=len(dropped), max_bytes=most)

    async def _drop(self, owner: str, job: str) -> None:
        stored = await self._outcomes.read_outcome(job)
        if stored is not None and stored.outcome.status is JobStatus.COMPLETED:
            await self._outcomes.delete_outcome(job, stored.seq)
            if stored.outcome.blob is not None:
                self._blobs.remove(stored.outcome.blob.name, if_opened=True)
        await self._results.release(owner, job)
