"""Estimates when a job ends, from the recent service times of its model."""

from __future__ import annotations

from collections.abc import Callable

from backbone.bus.bus import Queue
from backbone.store.store import Store
from gateway.jobs.records import now
from schemas.jobs import JobRecord, JobStatus
from schemas.presence import RegistrySnapshot, WorkerState


class EtaEstimator:
    """Estimates the remaining time of queued and running jobs."""

    def __init__(self, store: Store, snapshot: Callable[[], RegistrySnapshot | None]) -> None:
        self._store = store
        self._snapshot = snapshot

    async def eta_s(self, record: JobRecord, position: int | None) -> float | None:
        """Return the seconds until the job ends, or None if unknown.

        Args:
            record: The job.
            position: The number of jobs that wait ahead of it.
        """
        if record.status is JobStatus.IN_PROGRESS:
            return await self._remaining_s(record)
        snapshot = self._snapshot()
        if snapshot is not None and record.model in snapshot.holds:
            return None
        slots = count_slots(snapshot, Queue(record.capability, record.lane, record.model))
        if position is None or not slots:
            return None
        service_s = await self._store.mean_service_time_s(record.capability, record.model)
        return None if service_s is None else round(service_s * (position // slots + 2), 1)

    async def _remaining_s(self, record: JobRecord) -> float | None:
        if record.started_at is None:
            return None
        spent = now() - record.started_at
        if record.progress:
            return round(spent * (1 - record.progress) / record.progress, 1)
        service_s = await self._store.mean_service_time_s(record.capability, record.model)
        return None if service_s is None else round(max(0.0, service_s - spent), 1)


def count_slots(snapshot: RegistrySnapshot | None, queue: Queue) -> int:
    """Return how many jobs of the queue the ready workers run at once."""
    workers = snapshot.workers.values() if snapshot is not None else ()
    return sum(
        worker.slots
        for worker in workers
        if worker.state is WorkerState.READY
        and any(m.name == queue.model and queue.capability in m.capabilities for m in worker.models)
    )
