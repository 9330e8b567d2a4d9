"""Counts the jobs that wait before a job in its queue."""

from __future__ import annotations

import asyncio

from backbone.bus.bus import Queue
from backbone.bus.nats.requests import JetStreamError, RequestInbox, call_api_until_answered
from backbone.bus.nats.stream_reader import StreamReader
from backbone.bus.subjects import JOBS_STREAM, consumer_name, job_subject


class QueuePositions:
    """Counts the jobs before a job, by three parallel requests that read no other jobs."""

    def __init__(self, inbox: RequestInbox, *, replicated: bool) -> None:
        self._inbox = inbox
        self._jobs = StreamReader(inbox, JOBS_STREAM, replicated=replicated)

    async def before(self, queue: Queue, seq: int) -> int | None:
        """Return the number of jobs stored before `seq`, less those that run: workers take the oldest. None: `seq` does not
        exist.

        Concurrent changes make it inexact, never negative. Raises Unavailable.
        """
        subject = job_subject(*queue)
        after, state, running = await asyncio.gather(
            self._jobs.count_after(seq, subject), self._jobs.state(subject), self._running(queue)
        )
        if after is None:
            return None
        stored: int = (state.get("subjects") or {}).get(subject, 0)
        before: int = stored - after - 1 - running
        return max(0, before)

    async def _running(self, queue: Queue) -> int:
        operation = f"CONSUMER.INFO.{JOBS_STREAM}.{consumer_name(*queue)}"
        try:
            return int((await call_api_until_answered(self._inbox, operation)).get("num_ack_pending", 0))
        except JetStreamError:
            return 0  # without its consumer, no job of the queue runs
