"""Counts the jobs that wait before a job in its queue."""

from __future__ import annotations

import asyncio

from backbone.bus.bus import Queue, QueueDepth
from backbone.bus.nats.backlogs import Backlogs
from backbone.bus.nats.requests import JetStreamError, RequestInbox, call_api_until_answered
from backbone.bus.nats.stream_reader import StreamReader
from backbone.bus.subjects import (
    BACKLOG_STREAM,
    JOBS_STREAM,
    backlog_prefix,
    consumer_name,
    job_subject,
    parse_backlog_subject,
    stream_of_job,
)


class QueuePositions:
    """Counts the jobs before a job, by three parallel requests that read no other jobs."""

    def __init__(self, inbox: RequestInbox, backlogs: Backlogs, *, replicated: bool) -> None:
        self._inbox = inbox
        self._backlogs = backlogs
        self._jobs = StreamReader(inbox, JOBS_STREAM, replicated=replicated)
        self._backlog_reader = StreamReader(inbox, BACKLOG_STREAM, replicated=replicated)

    async def before(self, queue: Queue, seq: int) -> int | None:
        """Return the number of waiting jobs that start before the job under `seq`. None: no job waits under it.

        Concurrent changes make it inexact, never negative; so do owners whose jobs take longer or shorter than before. Raises
        Unavailable.
        """
        if stream_of_job(seq) == BACKLOG_STREAM:
            return await self._before_in_backlog(queue, seq)
        subject = job_subject(*queue)
        after, state, running = await asyncio.gather(
            self._jobs.count_after(seq, subject), self._jobs.state(subject), self._running(queue)
        )
        if after is None:
            return None
        stored: int = (state.get("subjects") or {}).get(subject, 0)
        before: int = stored - after - 1 - running
        return max(0, before)

    async def _before_in_backlog(self, queue: Queue, seq: int) -> int | None:
        """Count the jobs in the queue itself, and those in the backlog whose turn comes earlier."""
        message = await self._backlog_reader.find(seq)
        if message is None or parse_backlog_subject(message.subject) is None:
            return None
        subject, prefix = message.subject, f"{backlog_prefix(*queue)}."
        after, state, waiting = await asyncio.gather(
            self._backlog_reader.count_after(seq, subject),
            self._backlog_reader.state(f"{prefix}*"),
            self._backlogs.count_waiting(queue),
        )
        if after is None:
            return None
        counts: dict[str, int] = {name.removeprefix(prefix): n for name, n in (state.get("subjects") or {}).items()}
        owner = subject.removeprefix(prefix)
        index = max(0, counts.get(owner, 0) - after - 1)
        ahead: int = waiting + self._backlogs.of(queue).order.position(owner, index, counts)
        return ahead

    async def oldest_queued_at(self, depth: QueueDepth) -> int | None:
        """Return when the job was stored that has waited longest, in Unix seconds; None: none waits. Raises Unavailable."""
        reads = []
        if depth.waiting > depth.backlogged:
            reads.append(self._jobs.batch(depth.next_seq, job_subject(*depth.queue), 1))
        if depth.backlogged:
            reads.append(self._backlog_reader.batch(1, f"{backlog_prefix(*depth.queue)}.*", 1))
        found = await asyncio.gather(*reads)
        return min((messages[0].stored_at for messages, _ in found if messages), default=None)

    async def _running(self, queue: Queue) -> int:
        operation = f"CONSUMER.INFO.{JOBS_STREAM}.{consumer_name(*queue)}"
        try:
            return int((await call_api_until_answered(self._inbox, operation)).get("num_ack_pending", 0))
        except JetStreamError:
            return 0  # without its consumer, no job of the queue runs
