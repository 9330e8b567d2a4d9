"""Ends jobs on behalf of a gateway: stores the outcome, empties the queue and stops the worker."""

from __future__ import annotations

import contextlib

from backbone.bus.bus import GatewayBus, Queue
from backbone.bus.job_log import EventLog, JobStorage, StoredOutcome
from backbone.store.store import IllegalMove, Store
from gateway.jobs.records import outcome_fields
from schemas.control import Control, ControlOp
from schemas.errors import ErrorInfo, NexusError, Unavailable
from schemas.frames import decode_frame
from schemas.job_events import QUEUED
from schemas.jobs import TERMINAL_STATUSES, JobRecord, JobStatus
from schemas.outcome import Outcome, outcome_of


class JobTerminator:
    """Stores outcomes that a gateway decides, and enforces them."""

    def __init__(self, jobs: JobStorage, store: Store, bus: GatewayBus) -> None:
        self._log = jobs
        self._store = store
        self._bus = bus

    async def terminate(self, record: JobRecord, status: JobStatus, error: ErrorInfo | None = None) -> bool:
        """End a job, and return False if it has already ended.

        A queued job never runs; the worker of a running job receives an instruction to stop. Raises Unavailable.
        """
        if not await self.store_outcome(outcome_of(record, status, error=error)):
            return False
        if record.worker:
            control = Control(op=ControlOp.CANCEL, job=record.job, run=record.run)
            self._bus.send_control(record.worker, control.model_dump_json().encode())
        # Last, since it waits for NATS. The recorder of outcomes deletes it too, until NATS confirms it.
        with contextlib.suppress(Unavailable):
            await self.remove_from_queue(record)
        return True

    async def remove_from_queue(self, record: JobRecord) -> None:
        """Remove an ended job from its queue, even if a worker holds it. Raises Unavailable."""
        seq = await self.queue_sequence(record)
        if seq is not None:
            queue = Queue(record.capability, record.lane, record.model)
            await self._log.delete_job(queue, seq, record.job, record.run)

    async def record_move(self, owner: str, job: str, run: int, seq: int) -> None:
        """Write into a record where its job waits now, and remove a job that ended while it moved. If Redis is away, the job has no known
        position for the moment.
        """
        with contextlib.suppress(NexusError, IllegalMove):
            record = await self._store.update(owner, job, run=run, seq=seq)
            if record is not None and record.status in TERMINAL_STATUSES:
                await self.remove_from_queue(record)

    async def store_outcome(self, outcome: Outcome, payload: bytes = b"") -> bool:
        """Store an outcome, replacing a leftover outcome of an older run. Return False if the run has one. Raises Unavailable."""
        while not await self._log.store_outcome(outcome, payload):
            stored = await self._log.read_outcome(outcome.job)
            if stored is None:
                continue  # a retry deleted it in the meantime
            if stored.outcome.run >= outcome.run:
                return False
            await self._log.delete_outcome(outcome.job, stored.seq)
        return True

    async def record_outcome(self, stored: StoredOutcome) -> None:
        """Write a stored outcome into the job's record, unless another gateway has done so. Raises Unavailable."""
        outcome = stored.outcome
        with contextlib.suppress(IllegalMove):
            changes = outcome_fields(outcome, stored.stored_at)
            await self._store.move(outcome.owner, outcome.job, outcome.status, **changes)

    async def queue_sequence(self, record: JobRecord) -> int | None:
        """Return the job's sequence number in the queue, from its record or, for a first run, from its first event."""
        if record.seq:
            return record.seq
        initial = await read_initial_record(self._log, record.job)
        return initial.seq if initial is not None and initial.run == record.run else None


MAX_EVENTS_READ = 32
"""QUEUED is stored after the job itself, so a fast worker's first events may precede it."""


async def read_initial_record(log: EventLog, job_id: str) -> JobRecord | None:
    """Return the record with which a job began. None if its first event is no longer stored. Raises Unavailable."""
    for event in await log.first_events(job_id, MAX_EVENTS_READ):
        frame = decode_frame(event.data)
        if frame.kind == QUEUED:
            return JobRecord.decode(frame.payload)
    return None
