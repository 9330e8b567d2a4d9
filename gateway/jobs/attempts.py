"""Count a job's attempts from its stored events, including attempts that began while no gateway answered."""

from __future__ import annotations

from dataclasses import dataclass

from backbone.bus.job_log import EventLog
from schemas.errors import WORKER_DRAINED
from schemas.frames import AttemptReturned, Frame, FrameKind, decode_frame
from schemas.outcome import Outcome

FIRST_READ_COUNT = 4
"""The number of events read first: a job that starts has one event."""


@dataclass(slots=True)
class AttemptCount:
    """The attempts of one run, counted from its events."""

    starts: int = 0
    """Attempts started, without those that a stopping worker returned."""
    open: str = ""
    """The token of the newest attempt. Empty if that attempt was returned."""


async def count_attempts(log: EventLog, job: str, run: int) -> AttemptCount:
    """Count the attempts of one run. Raises Unavailable."""
    events = await log.first_events(job, FIRST_READ_COUNT)
    frames = [decode_frame(event.data) for event in events]
    if len(events) == FIRST_READ_COUNT:
        frames = await _all_frames(log, job)
    return _count(frames, run)


async def with_attempt_count(log: EventLog, outcome: Outcome) -> Outcome:
    """Return the outcome with its run's number of attempts.

    Only an attempt that started without a start grant does not know the number itself. Raises Unavailable.
    """
    if outcome.granted or not outcome.token:
        return outcome
    seen = await count_attempts(log, outcome.job, outcome.run)
    return outcome.model_copy(update={"attempts": seen.starts or outcome.attempts})


async def _all_frames(log: EventLog, job: str) -> list[Frame]:
    """Return the stored frames that start or return an attempt."""
    frames: list[Frame] = []
    events = log.follow_events(job)
    try:
        async for event in events:
            if event is None:
                break
            frame = decode_frame(event.data)
            if frame.kind in {FrameKind.STARTED, FrameKind.RETURNED}:
                frames.append(frame)
    finally:
        await events.aclose()
    return frames


def _count(frames: list[Frame], run: int) -> AttemptCount:
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
