"""Follows a job's events on any gateway: stored events, then new events, then the terminal event."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import orjson
import structlog

from backbone.bus.blobs import BlobStore
from backbone.bus.job_log import JobHistory, StoredEvent, StoredOutcome
from gateway.jobs.api import EventsExpired, JobEvent
from gateway.jobs.attempts import with_attempt_count
from gateway.jobs.records import job_json, with_outcome
from schemas.errors import InvalidRequest
from schemas.frames import AttemptStarted, BlobRef, Frame, FrameKind, decode_frame
from schemas.job_events import QUEUED, EventId, JobEventKind
from schemas.jobs import TERMINAL_STATUSES, JobRecord, JobStatus

log = structlog.get_logger(__name__)

TERMINAL_EVENT_KINDS = {
    JobStatus.COMPLETED: JobEventKind.COMPLETED,
    JobStatus.FAILED: JobEventKind.FAILED,
    JobStatus.CANCELLED: JobEventKind.CANCELLED,
    JobStatus.EXPIRED: JobEventKind.EXPIRED,
}


def parse_after(text: str) -> EventId:
    """Parse the id of the last event that a caller received. Raises InvalidRequest."""
    if not text:
        return EventId(0, 0, 0)
    try:
        return EventId.parse(text)
    except ValueError:
        raise InvalidRequest(
            f"'{text[:50]}' is not an event id. Send the id of the last event received, for example 1-1-42.",
            param="Last-Event-ID",
        ) from None


class JobEventStream:
    """Streams one job's events to one caller."""

    def __init__(
        self, jobs: JobHistory, blobs: BlobStore, record: JobRecord, after: str, *, all_attempts: bool = False
    ) -> None:
        """Create a stream.

        Args:
            jobs: The job log.
            blobs: The store of large events.
            record: The job.
            after: The id of the last event that the caller received. Empty: none.
            all_attempts: Whether to include the events of superseded attempts.
        """
        self._all_attempts = all_attempts
        self._log = jobs
        self._blobs = blobs
        self._record = record
        self._after = parse_after(after)
        self._assembler = EventAssembler(self._after)
        self._seq = 0
        """The sequence number of the newest event that was read."""

    async def events(self) -> AsyncGenerator[JobEvent | None, None]:
        """Yield events. See `gateway.jobs.api.JobsApi.follow_all_attempts`."""
        stored, caught_up = None, False
        ended_by = await self._read_outcome() if self._record.status is JobStatus.COMPLETED else None
        if ended_by is not None and not self._all_attempts:
            self._assembler = EventAssembler(self._after, only_token=ended_by.outcome.token)
        async with aclosing(self._assembled_events()) as events:
            async for event in events:
                if event is not None:
                    yield event
                    continue
                if not caught_up and ended_by is None:
                    caught_up = True
                    yield None
                stored = await self._read_outcome()
                if stored is not None:
                    break
                if self._record.status in TERMINAL_STATUSES:
                    raise EventsExpired(
                        "The outcome of this job has been deleted after its retention time. Submit the request again."
                    )
        if stored is None:
            return
        # An attempt stores all its events before its outcome, so one more read finds all of them.
        async with aclosing(self._stored_events(self._seq)) as rest:
            async for event in rest:
                yield event
        outcome = stored.outcome
        if outcome.status is JobStatus.COMPLETED and not self._assembler.is_complete(outcome.token, outcome.events):
            # Another attempt started before the outcome was stored, so replay the attempt that ended the job.
            self._after = EventId(0, 0, 0)
            self._assembler = EventAssembler(only_token=outcome.token, restarted=True)
            async with aclosing(self._stored_events()) as rest:
                async for event in rest:
                    yield event
        terminal = self._terminal_event(stored)
        if self._after != self._assembler.end_id():
            yield terminal

    async def _assembled_events(self, behind: int = 0) -> AsyncGenerator[JobEvent | None, None]:
        """Yield the events assembled from frames stored after a sequence number, and None whenever all stored frames are read."""
        async with aclosing(self._log.follow_events(self._record.job, behind)) as stored:
            async for event in stored:
                for assembled in self._assembler.close_stored() if event is None else self._assemble(event):
                    yield await self._to_job_event(assembled)
                if event is None:
                    yield None

    async def _stored_events(self, behind: int = 0) -> AsyncGenerator[JobEvent, None]:
        """Yield the events assembled from the frames that are stored now."""
        async with aclosing(self._assembled_events(behind)) as events:
            async for event in events:
                if event is None:
                    return
                yield event

    def _assemble(self, event: StoredEvent) -> list[AssembledEvent]:
        self._seq = event.seq
        try:
            frame = decode_frame(event.data)
            if frame.kind == FrameKind.SEALED:
                raise EventsExpired(
                    "The events of this job were deleted: it has ended, and your team keeps nothing (`retain: none`)."
                )
            return self._assembler.add(frame)
        except ValueError:
            log.exception("request.event_unreadable", job=self._record.job)
            return []

    async def _read_outcome(self) -> StoredOutcome | None:
        stored = await self._log.read_outcome(self._record.job)
        newest = max(self._record.run, self._assembler.run)
        if stored is None or stored.outcome.run < newest:
            return None
        return stored._replace(outcome=await with_attempt_count(self._log, stored.outcome))

    async def _to_job_event(self, assembled: AssembledEvent) -> JobEvent:
        run, delivery, seq = assembled.id
        data = assembled.data
        if assembled.by_ref:
            name = BlobRef.model_validate_json(data).name
            data = b"".join([part async for part in self._blobs.read(name)])
        elif assembled.kind is JobEventKind.QUEUED:
            data = job_json(JobRecord.decode(data))
        return JobEvent(assembled.kind, f"{run}-{delivery}-{seq}", data)

    def _terminal_event(self, stored: StoredOutcome) -> JobEvent:
        outcome = stored.outcome
        if outcome.status is JobStatus.COMPLETED and not self._assembler.is_complete(outcome.token, outcome.events):
            raise EventsExpired(
                "Some events of this job have been deleted after their retention time. Get its result at `GET /v1/jobs/{id}/result`."
            )
        run, delivery, seq = self._assembler.end_id()
        data = job_json(with_outcome(self._record, outcome, stored.stored_at))
        return JobEvent(TERMINAL_EVENT_KINDS[outcome.status], f"{run}-{delivery}-{seq}", data, outcome)


BEFORE_FIRST = EventId(0, 0, 0)
MAX_PENDING_FRAMES = 4096
"""The maximum number of frames that wait for earlier frames. More frames mean that the earlier ones are lost."""


@dataclass(frozen=True, slots=True)
class AssembledEvent:
    """An event to send. `data` of a CHUNK is the chunk itself, or a BlobRef as JSON if `by_ref`."""

    kind: JobEventKind
    id: EventId
    data: bytes
    by_ref: bool = False


class EventAssembler:
    """Assembles a job's events from its frames. Add every frame in the order in which the log stores them."""

    def __init__(self, after: EventId = BEFORE_FIRST, *, only_token: str = "", restarted: bool = False) -> None:
        """Create an assembler.

        Args:
            after: The id of the last event that the caller received.
            only_token: The attempt that ended the job; ignore all others. Empty: follow the newest attempt.
            restarted: Whether the caller received events of another attempt.
        """
        self._after = after
        self._only_token = only_token
        self._restarted = restarted or after.delivery > 0
        self._other_starts: set[EventId] = set()
        """With `only_token`: the ids of the first events of other attempts."""
        self._run = 0
        self._delivery = 0
        self._token = ""
        self._next = 1
        self._superseded: set[str] = set()
        self._pending: dict[str, dict[int, Frame]] = {}
        self._has_start = False
        """Whether the first event or the first attempt has been seen, so that no earlier event is missing."""

    @property
    def run(self) -> int:
        """The newest run that was seen."""
        return self._run

    def add(self, frame: Frame) -> list[AssembledEvent]:
        """Add a frame and return the events that it completes. Ignore copies and superseded attempts."""
        if frame.kind == QUEUED:
            return self._add_queued(frame)
        if frame.token in self._superseded or frame.run < self._run or self._is_other_attempt(frame):
            return []
        if frame.token == self._token:
            return self._add_current(frame)
        if frame.kind == FrameKind.STARTED:
            return self._add_started(frame)
        waiting = self._pending.setdefault(frame.token, {})
        if len(waiting) < MAX_PENDING_FRAMES:
            waiting[frame.seq] = frame
        return []

    def _is_other_attempt(self, frame: Frame) -> bool:
        """Return whether the frame belongs to an attempt that did not end the job."""
        if not self._only_token or frame.token == self._only_token:
            return False
        if frame.kind == FrameKind.STARTED:
            self._other_starts.add(EventId(frame.run, frame.delivery, 0))
        return True

    def is_complete(self, token: str, events: int) -> bool:
        """Return whether all events of this attempt were returned, and the caller can tell that they belong to one attempt."""
        resumed = self._only_token and self._after != BEFORE_FIRST
        ambiguous = resumed and EventId(self._run, self._delivery, 0) in self._other_starts
        return self._token == token and self._next >= events and not ambiguous

    def close_stored(self) -> list[AssembledEvent]:
        """Return pending events once all stored frames are added.

        If the caller already received the missing events, continue after them. Raises EventsExpired otherwise.
        """
        if self._has_start or not self._pending:
            return []
        token, frames = next(iter(self._pending.items()))
        first = frames[min(frames)]
        run, delivery, seq = self._after
        if (first.run, first.delivery) != (run, delivery) or first.seq > seq + 1:
            raise EventsExpired(
                "The first events of this job have been deleted after their retention time. Its result may still be stored: `GET /v1/jobs/{id}/result`."
            )
        self._has_start = True
        self._switch_to(token, first)
        self._next = first.seq
        return self._drain()

    def end_id(self) -> EventId:
        """Return the id of the terminal event."""
        return EventId(max(1, self._run), self._delivery, self._next)

    def _add_queued(self, frame: Frame) -> list[AssembledEvent]:
        first = frame.run > self._run or not self._has_start
        self._has_start = True
        if not first or (self._only_token and self._restarted):
            return []
        self._run, self._delivery, self._next = frame.run, 0, 1
        return self._unless_seen(JobEventKind.QUEUED, EventId(frame.run, 0, 0), frame.payload)

    def _add_started(self, frame: Frame) -> list[AssembledEvent]:
        started = AttemptStarted.model_validate_json(frame.payload)
        seen = bool(self._token)
        elsewhere = self._only_token and self._after[:2] != (frame.run, frame.delivery)
        if elsewhere or (seen and (frame.run, frame.delivery) <= (self._run, self._delivery)):
            # Another attempt, or NATS lost its delivery count: the caller's id may then belong to either attempt.
            self._after = BEFORE_FIRST
        # The caller may have received events of an earlier attempt that are no longer stored.
        restarted = seen or frame.run > 1 or self._restarted
        self._has_start = True
        self._switch_to(frame.token, frame)
        self._next = 1
        data = orjson.dumps({"worker": started.worker, "backend": started.backend})
        kind = JobEventKind.RESTARTED if restarted else JobEventKind.STARTED
        return [*self._unless_seen(kind, EventId(frame.run, frame.delivery, 0), data), *self._drain()]

    def _switch_to(self, token: str, frame: Frame) -> None:
        if self._token:
            self._superseded.add(self._token)
        self._token, self._run, self._delivery = token, frame.run, frame.delivery

    def _add_current(self, frame: Frame) -> list[AssembledEvent]:
        if frame.seq < self._next:
            return []
        waiting = self._pending.setdefault(frame.token, {})
        if len(waiting) < MAX_PENDING_FRAMES or frame.seq == self._next:
            waiting[frame.seq] = frame
        return self._drain()

    def _drain(self) -> list[AssembledEvent]:
        waiting = self._pending.get(self._token, {})
        out: list[AssembledEvent] = []
        while (frame := waiting.pop(self._next, None)) is not None:
            self._next += 1
            out += self._to_event(frame)
        return out

    def _to_event(self, frame: Frame) -> list[AssembledEvent]:
        where = EventId(frame.run, frame.delivery, frame.seq)
        if where <= self._after:
            return []
        if frame.kind == FrameKind.PROGRESS:
            return [AssembledEvent(JobEventKind.PROGRESS, where, frame.payload)]
        if frame.kind == FrameKind.ADAPTED:
            return [AssembledEvent(JobEventKind.ADAPTED, where, frame.payload)]
        if frame.kind in {FrameKind.CHUNK, FrameKind.BLOB}:
            return [AssembledEvent(JobEventKind.CHUNK, where, frame.payload, frame.kind == FrameKind.BLOB)]
        return []

    def _unless_seen(self, kind: JobEventKind, where: EventId, data: bytes) -> list[AssembledEvent]:
        return [AssembledEvent(kind, where, data)] if where > self._after else []
