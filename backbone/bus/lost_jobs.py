"""Jobs of which a restored Nexus has heard, and which it does not have.

Events are saved after the queue, so that nothing is missing of a job that is in it. So there are events of jobs that came
into the queue in between: who asked for one would be told that it waits, for ever, and cancelling it would take another job
out of the queue, that has got its sequence.
"""

from __future__ import annotations

import orjson

from backbone.bus.asking import ask
from backbone.bus.questions import Questions
from backbone.bus.stream_reading import Message, StreamReader
from backbone.bus.streams import API
from backbone.bus.subjects import DONE, DONE_STREAM, EVENTS, EVENTS_STREAM
from schemas.durable import QUEUED, decode_durable
from schemas.jobs import JobRecord

PURGE = f"{API}.STREAM.PURGE.{EVENTS_STREAM}".encode()


class LostJobs:
    """Raises Unavailable."""

    def __init__(self, questions: Questions) -> None:
        self._questions = questions
        self._events = StreamReader(questions, EVENTS_STREAM, replicated=True)
        self._words = StreamReader(questions, DONE_STREAM, replicated=True)

    async def forget(self, *, after: int, last: int) -> int:
        """Delete the events of jobs that were put into the queue behind its sequence `last`, and have no word. They were
        stored behind the events' sequence `after`. How many jobs that were.
        """
        count, left = 0, None
        while left != 0:
            found, left = await self._events.batch(after + 1)
            if not found:
                break
            for message in found:
                count += await self._forget_one(message, last)
            after = found[-1].seq
        return count

    async def _forget_one(self, message: Message, last: int) -> bool:
        job = message.subject.removeprefix(f"{EVENTS}.")
        run = _queued_behind(message, last)
        if not run or await self._words.last(f"{DONE}.{job}") is not None:
            return False
        if run > 1:  # a retry that was lost: the runs before it have been
            await self._events.delete(message.seq)
        else:
            await ask(self._questions, PURGE, orjson.dumps({"filter": message.subject}))
        return True


def _queued_behind(message: Message, last: int) -> int:
    """The run that an event says to be in the queue behind `last`; 0: it says no such thing."""
    try:
        frame = decode_durable(message.data)
        if frame.kind != QUEUED:
            return 0
        seq = JobRecord.model_validate_json(frame.payload).seq
    except ValueError:
        return 0
    return frame.run if seq is not None and seq > last else 0
