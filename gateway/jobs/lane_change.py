"""Move a waiting job to another lane, so that it still runs once.

The gateway holds the job's lease meanwhile, as an attempt would: the attempt gate lets none begin. It stores the job in the new lane, writes that into the record,
and deletes the old message. If it dies in between, both messages are there once its lease has ended: the attempt that begins first has the
lease, and the other message ends by the outcome, as redelivered jobs do. Repeated, the step stores no third one: its message id names the old one.
"""

from __future__ import annotations

import contextlib

from backbone.bus.bus import GatewayBus, Queue
from backbone.bus.job_log import JobStorage
from backbone.ids import new_token
from backbone.store.store import IllegalMove, Store
from gateway.jobs.api import JobNotWaiting
from gateway.jobs.terminator import JobTerminator
from schemas.errors import NexusError, Unavailable
from schemas.jobs import TERMINAL_STATUSES, Envelope, JobRecord, JobStatus, Lane

LEASE_S = 10.0


class LaneChanger:
    """Moves waiting jobs between lanes."""

    def __init__(self, jobs: JobStorage, store: Store, terminator: JobTerminator, bus: GatewayBus) -> None:
        self._log = jobs
        self._store = store
        self._terminator = terminator
        self._bus = bus

    async def change(self, record: JobRecord, lane: Lane) -> JobRecord:
        """Return the record of the job in its new lane. Raises JobNotWaiting, QueueFull, Unavailable."""
        if record.status is not JobStatus.QUEUED:
            raise JobNotWaiting(f"Only a waiting job can change its lane. This job is {record.status}.")
        if record.lane is lane:
            return record
        token = f"lane-{new_token()}"
        if not await self._store.acquire_lease(record.job, token, LEASE_S):
            raise JobNotWaiting("This job starts just now.")
        try:
            return await self._move(record, lane)
        finally:
            with contextlib.suppress(NexusError):  # it ends by itself
                await self._store.release_lease(record.job, token)

    async def _move(self, record: JobRecord, lane: Lane) -> JobRecord:
        seq = await self._terminator.queue_sequence(record)
        message = await self._log.read_job(seq, record.job, record.run) if seq else None
        if seq is None or message is None:
            raise Unavailable(
                "This job is on its way between two queues, or starts just now; retry shortly.", retry_after_s=1.0
            )
        envelope, body = Envelope.decode(message)
        await self._bus.open_queue(Queue(record.capability, lane, record.model))
        new_seq = await self._log.enqueue(envelope.model_copy(update={"lane": lane}), body, replaces=seq)
        try:
            moved = await self._store.update(record.owner, record.job, run=record.run, lane=lane, seq=new_seq)
        except IllegalMove:
            moved = None
        if moved is None or moved.status in TERMINAL_STATUSES:  # it was cancelled or retried meanwhile
            await self._log.delete_job(Queue(record.capability, lane, record.model), new_seq, record.job, record.run)
            raise JobNotWaiting("This job has ended meanwhile.")
        await self._terminator.remove_from_queue(record)
        return moved
