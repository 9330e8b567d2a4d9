"""Forget the content of jobs of teams that keep nothing: when they have failed, when their result was delivered, or after an hour."""

from __future__ import annotations

from backbone.bus.blobs import BlobStore
from backbone.bus.content_keys import ContentKeys
from backbone.bus.job_log import OutcomeStore
from backbone.store.store import Store
from schemas.jobs import JobRecord, JobStatus
from schemas.outcome import Outcome

UNFETCHED_RESULT_S = 3600.0
"""A result that nobody fetches is forgotten this time after the job's end."""
NO_TIMER_S = 10 * 365 * 86_400.0
"""Longer than records are stored, with which their timers end."""


class ContentRetention:
    """Decides when content is forgotten. Every method does nothing for content that may be kept, and raises Unavailable."""

    def __init__(self, keys: ContentKeys, outcomes: OutcomeStore, store: Store, blobs: BlobStore) -> None:
        self._keys = keys
        self._outcomes = outcomes
        self._store = store
        self._blobs = blobs

    async def record_end(self, outcome: Outcome) -> None:
        """Forget a job that has no result to deliver; give a result its time."""
        if not outcome.sealed or not await self._is_temporary(outcome.job):
            return
        if outcome.status is JobStatus.COMPLETED:
            await self._store.update(outcome.owner, outcome.job, due_s=UNFETCHED_RESULT_S)
            return
        for name in outcome.uploads:
            self._blobs.remove(name)
        await self._keys.forget(outcome.job)

    async def confirm_delivery(self, job: str) -> None:
        """Forget a job whose result was delivered."""
        if await self._is_temporary(job):
            await self._forget(job)

    async def expire(self, record: JobRecord) -> None:
        """Forget an ended job whose time is over."""
        await self.confirm_delivery(record.job)
        await self._store.update(record.owner, record.job, due_s=NO_TIMER_S)

    async def _forget(self, job: str) -> None:
        stored = await self._outcomes.read_outcome(job)
        if stored is not None and stored.outcome.blob is not None:
            self._blobs.remove(stored.outcome.blob.name, if_opened=True)
        await self._keys.forget(job)

    async def _is_temporary(self, job: str) -> bool:
        content = await self._keys.find(job)
        return content is not None and content.retain_none
