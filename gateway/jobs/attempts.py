"""Count a job's attempts by what they stored: also those that began while no gateway answered."""

from __future__ import annotations

from dataclasses import dataclass

from backbone.bus.job_log import JobLog
from schemas.errors import WORKER_DRAINED
from schemas.frames import AttemptReturned, FrameKind
from schemas.job_events import DurableFrame, decode_durable_frame
from schemas.outcome import Outcome

FEW = 4
"""Events that are read at once: a job that begins has one."""


@dataclass(slots=True)
class AttemptCount:
    """What the events say about the attempts of one run."""

    starts: int = 0
    """Attempts begun, and not handed back by a worker that shut down."""
    open: str = ""
    """The token of the newest, if it has not been given back."""


async def count_attempts(log: JobLog, job: str, run: int) -> AttemptCount:
    """Return what the stored events say about one run. Raises Unavailable."""
    events = await log.first_events(job, FEW)
    frames = [decode_durable_frame(event.data) for event in events]
    if len(events) == FEW:
        frames = await _all_frames(log, job)
    return _count(frames, run)


async def with_attempt_count(log: JobLog, outcome: Outcome) -> Outcome:
    """Return the word with the number of attempts that its run had. Only a word of an attempt that began without a start
    grant does not know it. Raises Unavailable.
    """
    if outcome.granted or not outcome.token:
        return outcome
    seen = await count_attempts(log, outcome.job, outcome.run)
    return outcome.model_copy(update={"attempts": seen.starts or outcome.attempts})


async def _all_frames(log: JobLog, job: str) -> list[DurableFrame]:
    """Return the frames that say something about attempts, of those that the stream holds now."""
    frames: list[DurableFrame] = []
    events = log.follow_events(job)
    try:
        async for event in events:
            if event is None:
                break
            frame = decode_durable_frame(event.data)
            if frame.kind in {FrameKind.STARTED, FrameKind.RETURNED}:
                frames.append(frame)
    finally:
        await events.aclose()
    return frames


def _count(frames: list[DurableFrame], run: int) -> AttemptCount:
    seen, tokens, back = AttemptCount(), set[str](), set[str]()
    for frame in frames:
        if frame.run != run:
            continue
        if frame.kind == FrameKind.STARTED and frame.token not in tokens:
            tokens.add(frame.token)
            seen.starts += 1
            seen.open = frame.token
        elif frame.kind == FrameKind.RETURNED and frame.token in tokens - back:
            back.add(frame.token)
            if seen.open == frame.token:
                seen.open = ""
            returned = AttemptReturned.model_validate_json(frame.payload)
            if returned.code == WORKER_DRAINED or not returned.counted:
                seen.starts -= 1
    return seen
