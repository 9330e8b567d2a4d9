"""What a job's record began as, from its events: for when Redis does not know (any more)."""

from __future__ import annotations

from backbone.bus.job_log import JobLog
from schemas.durable import QUEUED, decode_durable
from schemas.jobs import JobRecord

LOOK_AT = 32
"""QUEUED is said when the job is in the queue already: a quick worker's first events may be stored before it."""


async def began_as(log: JobLog, job_id: str) -> JobRecord | None:
    """The record of its first run; None: it is not kept any more. Raises Unavailable."""
    for event in await log.first(job_id, LOOK_AT):
        frame = decode_durable(event.data)
        if frame.kind == QUEUED:
            return JobRecord.model_validate_json(frame.payload)
    return None
