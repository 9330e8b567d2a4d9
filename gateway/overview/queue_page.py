"""Show the jobs in a model's queue, in the order in which they will start, and those that run."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from backbone.bus.bus import GatewayBus, Queue
from backbone.bus.queue_listing import QueuedJob, QueuePage
from backbone.store.store import Store
from gateway.dispatcher import Dispatcher
from gateway.jobs.estimator import count_slots
from gateway.jobs.records import now
from schemas.errors import InvalidRequest, NexusError
from schemas.jobs import Capability, JobRecord, JobStatus


class QueueBrowser:
    """Reads pages of queues. It shows no content of jobs, only what operators may see of any team."""

    def __init__(self, bus: GatewayBus, dispatcher: Dispatcher, store: Store) -> None:
        self._bus = bus
        self._dispatcher = dispatcher
        self._store = store

    async def page(self, model: str, after: str, limit: int) -> dict[str, Any]:
        """Return a page of the API. Raises InvalidRequest for an unknown cursor, Unavailable."""
        try:
            page = await self._bus.list_jobs(model, after, limit)
        except ValueError:
            raise InvalidRequest(
                "`after` is not a cursor of this queue. Leave it out for the first page.", param="after"
            ) from None
        jobs = [*page.waiting, *page.running]
        service_s, records = await asyncio.gather(
            self._service_times({job.queue.capability for job in jobs}, model),
            asyncio.gather(*(self._record(job) for job in page.running)),
        )
        return {
            "object": "list",
            "model": model,
            "total": page.total,
            "data": self._waiting(page, service_s),
            "running": [_running(job, record, service_s) for job, record in zip(page.running, records, strict=True)],
            "has_more": page.has_more,
            "next": page.next_cursor,
        }

    def _waiting(self, page: QueuePage, service_s: dict[Capability, float]) -> list[dict[str, Any]]:
        holds = self._dispatcher.is_held
        snapshot = self._dispatcher.registry.snapshot
        slots: dict[Queue, int] = {}
        found = []
        for position, job in enumerate(page.waiting, page.first_position):
            if job.queue not in slots:
                slots[job.queue] = 0 if holds(job.queue.model) else count_slots(snapshot, job.queue)
            seconds = service_s.get(job.queue.capability)
            count = slots[job.queue]
            eta_s = None if seconds is None or not count else round(seconds * (position // count + 2), 1)
            found.append(_job(job) | {"queue_position": position, "eta_seconds": eta_s})
        return found

    async def _service_times(self, capabilities: set[Capability], model: str) -> dict[Capability, float]:
        """Return what jobs took lately. Without Redis, nothing is known."""
        found: dict[Capability, float] = {}
        with contextlib.suppress(NexusError):
            for capability in capabilities:
                seconds = await self._store.mean_service_time_s(capability.value, model)
                if seconds is not None:
                    found[capability] = seconds
        return found

    async def _record(self, job: QueuedJob) -> JobRecord | None:
        if not job.is_durable:
            return None
        with contextlib.suppress(NexusError):
            return await self._store.get(job.owner, job.job)
        return None


def _job(job: QueuedJob) -> dict[str, Any]:
    return {
        "id": job.job,
        "object": "queued_job",
        "kind": "job" if job.is_durable else "request",
        "team": job.owner,
        "lane": job.queue.lane.value,
        "capability": job.queue.capability.value,
        "endpoint": job.endpoint,
        "model": job.public_model,
        "batch": job.batch or None,
        "queued_at": job.stored_at,
        "size_bytes": job.size,
    }


def _running(job: QueuedJob, record: JobRecord | None, service_s: dict[Capability, float]) -> dict[str, Any]:
    """Return a job that a worker holds. Of a request on an open connection, only its gateway knows the worker."""
    state: dict[str, Any] = {
        "worker": None,
        "attempts": None,
        "started_at": None,
        "progress": None,
        "eta_seconds": None,
    }
    if record is not None and record.run == job.run and record.status is JobStatus.IN_PROGRESS:
        seconds, started_at = service_s.get(job.queue.capability), record.started_at
        left_s = None
        if started_at is not None:
            spent_s = now() - started_at
            if record.progress:
                left_s = round(spent_s * (1 - record.progress) / record.progress, 1)
            elif seconds is not None:
                left_s = round(max(0.0, seconds - spent_s), 1)
        state = {
            "worker": record.worker,
            "attempts": record.attempts,
            "started_at": started_at,
            "progress": record.progress,
            "eta_seconds": left_s,
        }
    return _job(job) | state
