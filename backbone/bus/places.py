"""How many jobs wait before another one."""

from __future__ import annotations

import asyncio

import orjson

from backbone.bus.asking import ask
from backbone.bus.base import Queue
from backbone.bus.questions import Questions
from backbone.bus.stream_reading import StreamReader
from backbone.bus.subjects import JOBS_STREAM, consumer_name, job_subject


class Places:
    """Reads the jobs stream: three questions at once, none of which reads other jobs."""

    def __init__(self, questions: Questions, *, replicated: bool) -> None:
        self._questions = questions
        self._jobs = StreamReader(questions, JOBS_STREAM, replicated=replicated)

    async def before(self, queue: Queue, seq: int) -> int | None:
        """Those stored before `seq`, less those that run: a worker takes the oldest. None: `seq` is not there.

        What changes meanwhile makes it inexact, never negative. Raises Unavailable.
        """
        subject = job_subject(*queue)
        after, state, running = await asyncio.gather(
            self._jobs.after(seq, subject), self._jobs.state(subject), self._running(queue)
        )
        if after is None:
            return None
        stored: int = (state.get("subjects") or {}).get(subject, 0)
        before: int = stored - after - 1 - running
        return max(0, before)

    async def _running(self, queue: Queue) -> int:
        subject = f"$JS.API.CONSUMER.INFO.{JOBS_STREAM}.{consumer_name(*queue)}".encode()
        # Without the consumer nothing runs.
        return int(orjson.loads((await ask(self._questions, subject, b""))[0].data).get("num_ack_pending", 0))
