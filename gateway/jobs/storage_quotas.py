"""Bound what the jobs of each owner keep stored: request bodies in blobs, and ended jobs with their results.

Above its bytes of results, a team's own oldest results are deleted, and after them its oldest ended jobs, so that they never take the room of other
teams' results.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from backbone.bus.blobs import BlobStore
from backbone.bus.job_log import OutcomeStore, StoredOutcome
from backbone.store.byte_quotas import ByteQuotas
from backbone.store.store import Store
from gateway.http.body_storage import stored_item
from gateway.limits.effective import EffectiveLimits
from gateway.signed_urls import url_blobs
from schemas.jobs import TERMINAL_STATUSES, Capability, JobStatus
from schemas.outcome import Outcome

log = structlog.get_logger(__name__)

MAX_DROPPED = 64
"""Results that are deleted for one new result at most; the next one goes on."""
OVERHEAD_BYTES = 1024
"""Bytes that an ended job takes beside its answer and its metadata."""


class JobStorageQuotas:
    """Counts the stored bodies and results of jobs by owner. Raises Unavailable while Redis or NATS is away."""

    def __init__(
        self,
        bodies: ByteQuotas,
        results: ByteQuotas,
        outcomes: OutcomeStore,
        blobs: BlobStore,
        store: Store,
        limits: Callable[[str], EffectiveLimits],
        is_unfinished: Callable[[str, str], Awaitable[bool]],
        *,
        keep_s: float,
    ) -> None:
        """`limits` returns the limits of an API key, by its id; `is_unfinished` whether an owner's batch has not ended. `keep_s`: the
        lifetime of results.
        """
        self._bodies = bodies
        self._results = results
        self._outcomes = outcomes
        self._blobs = blobs
        self._store = store
        self._limits = limits
        self._is_unfinished = is_unfinished
        self._keep_s = keep_s

    async def release_bodies(self, outcome: Outcome) -> None:
        """Count the bodies of an ended job no more."""
        for name in outcome.uploads:
            await self._bodies.release(outcome.owner, stored_item(name))

    async def count_result(self, outcome: Outcome, payload: bytes) -> None:
        """Count an ended job and its result, and delete the oldest of an owner that has too many bytes. Idempotent.

        `payload`: the outcome's, as it is stored.
        """
        most = self._limits(outcome.key).result_bytes if outcome.key else None
        if most is None:
            return
        owner, size = outcome.owner, ended_job_bytes(outcome, len(payload))
        if outcome.capability is Capability.IMAGES and outcome.status is JobStatus.COMPLETED and outcome.blob is None:
            size += await self._url_bytes(outcome, payload)
        await self._results.reserve(owner, outcome.job, size, ttl_s=self._keep_s, most=None)
        unfinished: dict[str, bool] = {"": False}
        dropped = 0
        for job in await self._results.oldest(owner, most, MAX_DROPPED):
            dropped += await self._drop(owner, job, unfinished)
        if dropped:
            log.warning("results.dropped", owner=owner, results=dropped, max_bytes=most)

    async def _url_bytes(self, outcome: Outcome, payload: bytes) -> int:
        """Return the bytes of the results to which the answer leads by URL."""
        if outcome.sealed:
            stored = await self._outcomes.read_outcome(outcome.job)
            payload = stored.payload if stored is not None else b""
        infos = [await self._blobs.info(name) for name in url_blobs(payload)]
        return sum(info.size for info in infos if info is not None and info.owner == outcome.owner)

    async def _drop(self, owner: str, job: str, unfinished: dict[str, bool]) -> bool:
        """Delete a job's result, or what is left of the job if the result is deleted. False: a batch still needs it.

        `unfinished`: the batches that were looked up already.
        """
        stored = await self._outcomes.read_outcome(job)
        if stored is None:
            record = await self._store.get(owner, job)
            if record is not None and record.status in TERMINAL_STATUSES:  # a retried job counts when it ends again
                await self._store.remove(owner, job)
            await self._results.release(owner, job)
            return True
        outcome = stored.outcome
        if outcome.batch not in unfinished:
            unfinished[outcome.batch] = await self._is_unfinished(owner, outcome.batch)
        if unfinished[outcome.batch]:
            size = ended_job_bytes(outcome, len(stored.payload))
            await self._results.reserve(owner, job, size, ttl_s=self._keep_s, most=None)  # it is the newest again
            return False
        await self._delete_result(stored)
        await self._results.reserve(owner, job, record_bytes(outcome), ttl_s=self._keep_s, most=None)
        return True

    async def _delete_result(self, stored: StoredOutcome) -> None:
        await self._outcomes.delete_outcome(stored.outcome.job, stored.seq)
        if stored.outcome.status is not JobStatus.COMPLETED:
            return
        names = [stored.outcome.blob.name] if stored.outcome.blob is not None else url_blobs(stored.payload)
        for name in names:
            self._blobs.remove(name, if_opened=True)


def ended_job_bytes(outcome: Outcome, payload_bytes: int) -> int:
    """Return the bytes that an ended job takes, with its result."""
    return record_bytes(outcome) + max(payload_bytes, outcome.size)


def record_bytes(outcome: Outcome) -> int:
    """Return the bytes that an ended job takes without its result."""
    return OVERHEAD_BYTES + sum(len(name) + len(value) for name, value in outcome.metadata.items())
