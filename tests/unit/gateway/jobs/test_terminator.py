"""The initial record of a job is read from its QUEUED event, wherever that is stored."""

from __future__ import annotations

import pytest

from backbone.testing.bus import MemoryBroker
from backbone.testing.job_log import MemoryJobLog
from gateway.jobs.terminator import read_initial_record
from schemas.frames import FrameKind, encode_frame
from schemas.job_events import NO_TOKEN, QUEUED
from schemas.jobs import Capability, JobRecord

JOB = "job_01a20f1b33c97ef68834fadc3c3648a7"
RECORD = JobRecord(
    job=JOB,
    owner="o",
    endpoint="/v1/chat/completions",
    model="m",
    public_model="m",
    capability=Capability.CHAT,
    created_at=1,
    seq=7,
)


@pytest.mark.parametrize("before", [0, 1, 20])
async def test_a_quick_workers_events_may_come_first(before: int) -> None:
    """A worker may store events before the gateway has stored QUEUED."""
    log = MemoryJobLog(MemoryBroker())
    await log.start()
    for seq in range(before):
        kind = FrameKind.STARTED if seq == 0 else FrameKind.CHUNK
        await log.append_event(JOB, encode_frame(kind.value, 1, 1, seq, "t", b"{}"))
    assert await read_initial_record(log, JOB) is None
    await log.append_event(JOB, encode_frame(QUEUED, 1, 0, 0, NO_TOKEN, RECORD.encode()))
    assert await read_initial_record(log, JOB) == RECORD
