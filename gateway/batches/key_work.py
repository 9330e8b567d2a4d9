"""Cancel the unfinished work of one API key: its batches, and its jobs."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from backbone.store.store import Store
from gateway.batches.repository import BatchNotFound, IllegalBatchTransition
from gateway.batches.service import BatchService
from gateway.jobs.api import JobNotFound, JobsApi
from schemas.errors import InvalidRequest

MAX_CONCURRENCY = 16
"""Jobs that are cancelled at the same time."""


class KeyWork:
    """The unfinished work of API keys."""

    def __init__(self, store: Store, jobs: JobsApi, batches: BatchService) -> None:
        self._store = store
        self._jobs = jobs
        self._batches = batches

    async def cancel(self, owner: str, key: str) -> int:
        """Cancel the work of a key that belongs to `owner`, and return the number of cancelled jobs. Raises Unavailable."""
        for batch in await self._batches.unfinished(owner):
            if batch.key == key:
                with suppress(BatchNotFound, IllegalBatchTransition, InvalidRequest):
                    await self._batches.cancel(owner, batch.id)
        jobs = await self._store.open_jobs(key)
        slots = asyncio.Semaphore(MAX_CONCURRENCY)

        async def cancel(job_owner: str, job: str) -> None:
            async with slots:
                with suppress(JobNotFound):
                    await self._jobs.cancel(job_owner, job)

        await asyncio.gather(*(cancel(*job) for job in jobs))
        return len(jobs)
