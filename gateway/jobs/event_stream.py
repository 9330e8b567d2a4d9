"""Following a job's events, from any gateway: what is kept, then what comes, then how it ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import orjson
import structlog

from backbone.bus.blobs import BlobStore
from backbone.bus.job_log import JobLog, StoredEvent, StoredOutcome
from gateway.jobs.api import EventsExpired, JobEvent
from gateway.jobs.attempts import with_attempt_count
from gateway.jobs.records import job_json, with_outcome
from schemas.errors import InvalidRequest
from schemas.frames import AttemptStarted, BlobRef, FrameKind
from schemas.job_events import QUEUED, DurableFrame, EventId, JobEventKind, decode_durable_frame
from schemas.jobs import TERMINAL_STATUSES, JobRecord, JobStatus

log = structlog.get_logger(__name__)

TERMINAL_EVENT = {
    JobStatus.COMPLETED: JobEventKind.COMPLETED,
    JobStatus.FAILED: JobEventKind.FAILED,
    JobStatus.CANCELLED: JobEventKind.CANCELLED,
    JobStatus.EXPIRED: JobEventKind.EXPIRED,
}


def parse_after(text: str) -> EventId:
    """The id of the last event that a caller has had. Raises InvalidRequest."""
    if not text:
        return EventId(0, 0, 0)
    try:
        return EventId.parse(text)
    except ValueError:
        raise InvalidRequest(
            f"'{text[:50]}' is no id of an event; they look like 1-1-42", param="Last-Event-ID"
        ) from None


class JobEventStream:
    """One caller's view of one job's events."""

    def __init__(self, jobs: JobLog, blobs: BlobStore, record: JobRecord, after: str, *, every: bool = False) -> None:
        """`every`: attempts that were given up are told too."""
        self._every = every
        self._log = jobs
        self._blobs = blobs
        self._record = record
        self._after = parse_after(after)
        self._assembly = EventAssembler(self._after)
        self._seq = 0
        """Of the newest stored event that was read."""

    async def events(self) -> AsyncGenerator[JobEvent | None, None]:
        """See `gateway.jobs.api.JobsApi.follow_all_attempts`."""
        decision, caught_up = None, False
        ended_by = await self._decision() if self._record.status is JobStatus.COMPLETED else None
        if ended_by is not None and not self._every:
            self._assembly = EventAssembler(self._after, only=ended_by.outcome.token)
        async with aclosing(self._read()) as told:
            async for event in told:
                if event is not None:
                    yield event
                    continue
                if not caught_up and ended_by is None:
                    caught_up = True
                    yield None
                decision = await self._decision()
                if decision is not None:
                    break
                if self._record.status in TERMINAL_STATUSES:
                    raise EventsExpired("how this job ended is not kept any more")
        if decision is None:
            return
        # Whatever the deciding attempt stored was there before its word: one more look finds all of it.
        async with aclosing(self._rest(self._seq)) as rest:
            async for event in rest:
                yield event
        word = decision.outcome
        if word.status is JobStatus.COMPLETED and not self._assembly.is_whole(word.token, word.events):
            # The attempt that ended the job, from its beginning: another one had begun before its word was there.
            self._after = EventId(0, 0, 0)
            self._assembly = EventAssembler(only=word.token, again=True)
            async with aclosing(self._rest()) as rest:
                async for event in rest:
                    yield event
        end = self._end(decision)
        if self._after != self._assembly.end_id():
            yield end

    async def _read(self, behind: int = 0) -> AsyncGenerator[JobEvent | None, None]:
        """What there is to tell of events stored behind a sequence; None: there are no more for now."""
        async with aclosing(self._log.follow_events(self._record.id, behind)) as stored:
            async for event in stored:
                for piece in self._assembly.settle() if event is None else self._feed(event):
                    yield await self._tell(piece)
                if event is None:
                    yield None

    async def _rest(self, behind: int = 0) -> AsyncGenerator[JobEvent, None]:
        """The same of those that are there."""
        async with aclosing(self._read(behind)) as told:
            async for event in told:
                if event is None:
                    return
                yield event

    def _feed(self, event: StoredEvent) -> list[AssembledEvent]:
        self._seq = event.seq
        try:
            return self._assembly.feed(decode_durable_frame(event.data))
        except ValueError:
            log.exception("request.event_unreadable", job=self._record.id)
            return []

    async def _decision(self) -> StoredOutcome | None:
        decision = await self._log.read_outcome(self._record.id)
        newest = max(self._record.run, self._assembly.run)
        if decision is None or decision.outcome.run < newest:
            return None
        return decision._replace(outcome=await with_attempt_count(self._log, decision.outcome))

    async def _tell(self, piece: AssembledEvent) -> JobEvent:
        run, delivery, seq = piece.id
        data = piece.data
        if piece.by_ref:
            name = BlobRef.model_validate_json(data).name
            data = b"".join([part async for part in self._blobs.read(name)])
        elif piece.kind is JobEventKind.QUEUED:
            data = job_json(JobRecord.model_validate_json(data))
        return JobEvent(piece.kind, f"{run}-{delivery}-{seq}", data)

    def _end(self, decision: StoredOutcome) -> JobEvent:
        word = decision.outcome
        if word.status is JobStatus.COMPLETED and not self._assembly.is_whole(word.token, word.events):
            raise EventsExpired("some events of this job are not kept any more; its result is, at …/result")
        run, delivery, seq = self._assembly.end_id()
        data = job_json(with_outcome(self._record, word, decision.stored_at))
        return JobEvent(TERMINAL_EVENT[word.status], f"{run}-{delivery}-{seq}", data, word)


START = EventId(0, 0, 0)
MAX_EARLY = 4096
"""Frames that wait for those before them; more are a sign that those are lost."""


@dataclass(frozen=True, slots=True)
class AssembledEvent:
    """An event to be told. CHUNK: `data` is the chunk, or where `by_ref` a BlobRef's JSON."""

    kind: JobEventKind
    id: EventId
    data: bytes
    by_ref: bool = False


class EventAssembler:
    """Feed it every frame of a job in the order in which they are stored."""

    def __init__(self, after: EventId = START, *, only: str = "", again: bool = False) -> None:
        """`after`: the caller has had everything up to this. `only`: the attempt that has ended the job, whatever began
        beside it. `again`: the caller has had events of another one.
        """
        self._after = after
        self._only = only
        self._again = again or after.delivery > 0
        self._same: set[EventId] = set()
        """With `only`: the ids of other attempts' first events."""
        self._run = 0
        self._delivery = 0
        self._token = ""
        self._next = 1
        self._past: set[str] = set()
        self._early: dict[str, dict[int, DurableFrame]] = {}
        self._begun = False
        """The first event, or the first attempt, has been seen: nothing before it is missing."""

    @property
    def run(self) -> int:
        """The newest run seen."""
        return self._run

    def feed(self, frame: DurableFrame) -> list[AssembledEvent]:
        """What this frame brings to be told; nothing for copies and for attempts that have been replaced."""
        if frame.kind == QUEUED:
            return self._queued(frame)
        if frame.token in self._past or frame.run < self._run or self._is_beside(frame):
            return []
        if frame.token == self._token:
            return self._take(frame)
        if frame.kind == FrameKind.STARTED:
            return self._started(frame)
        waiting = self._early.setdefault(frame.token, {})
        if len(waiting) < MAX_EARLY:
            waiting[frame.seq] = frame
        return []

    def _is_beside(self, frame: DurableFrame) -> bool:
        """Whether it is of an attempt that did not end the job."""
        if not self._only or frame.token == self._only:
            return False
        if frame.kind == FrameKind.STARTED:
            self._same.add(EventId(frame.run, frame.delivery, 0))
        return True

    def is_whole(self, token: str, events: int) -> bool:
        """Whether all of this attempt's events have been told, and the caller knows that they are of one attempt."""
        resumed = self._only and self._after != START
        ambiguous = resumed and EventId(self._run, self._delivery, 0) in self._same
        return self._token == token and self._next >= events and not ambiguous

    def settle(self) -> list[AssembledEvent]:
        """Everything that is kept has been fed. Raises EventsExpired when something before it is not kept any more.

        Where the caller has had what is missing, it goes on from there.
        """
        if self._begun or not self._early:
            return []
        token, frames = next(iter(self._early.items()))
        first = frames[min(frames)]
        run, delivery, seq = self._after
        if (first.run, first.delivery) != (run, delivery) or first.seq > seq + 1:
            raise EventsExpired("the first events of this job are not kept any more; its result may be, at …/result")
        self._begun = True
        self._adopt(token, first)
        self._next = first.seq
        return self._in_order()

    def end_id(self) -> EventId:
        """The id of the terminal event."""
        return EventId(max(1, self._run), self._delivery, self._next)

    def _queued(self, frame: DurableFrame) -> list[AssembledEvent]:
        first = frame.run > self._run or not self._begun
        self._begun = True
        if not first or (self._only and self._again):
            return []
        self._run, self._delivery, self._next = frame.run, 0, 1
        return self._told(JobEventKind.QUEUED, EventId(frame.run, 0, 0), frame.payload)

    def _started(self, frame: DurableFrame) -> list[AssembledEvent]:
        started = AttemptStarted.model_validate_json(frame.payload)
        seen = bool(self._token)
        elsewhere = self._only and self._after[:2] != (frame.run, frame.delivery)
        if elsewhere or (seen and (frame.run, frame.delivery) <= (self._run, self._delivery)):
            # Of another attempt, or NATS forgot how often it delivered: then the id that the caller has may be of either.
            self._after = START
        # Of an earlier attempt, the caller may have what is not kept any more.
        again = seen or frame.run > 1 or self._again
        self._begun = True
        self._adopt(frame.token, frame)
        self._next = 1
        data = orjson.dumps({"worker": started.worker, "backend": started.backend})
        kind = JobEventKind.RESTARTED if again else JobEventKind.STARTED
        return [*self._told(kind, EventId(frame.run, frame.delivery, 0), data), *self._in_order()]

    def _adopt(self, token: str, frame: DurableFrame) -> None:
        if self._token:
            self._past.add(self._token)
        self._token, self._run, self._delivery = token, frame.run, frame.delivery

    def _take(self, frame: DurableFrame) -> list[AssembledEvent]:
        if frame.seq < self._next:
            return []
        waiting = self._early.setdefault(frame.token, {})
        if len(waiting) < MAX_EARLY or frame.seq == self._next:
            waiting[frame.seq] = frame
        return self._in_order()

    def _in_order(self) -> list[AssembledEvent]:
        waiting = self._early.get(self._token, {})
        out: list[AssembledEvent] = []
        while (frame := waiting.pop(self._next, None)) is not None:
            self._next += 1
            out += self._piece(frame)
        return out

    def _piece(self, frame: DurableFrame) -> list[AssembledEvent]:
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

    def _told(self, kind: JobEventKind, where: EventId, data: bytes) -> list[AssembledEvent]:
        return [AssembledEvent(kind, where, data)] if where > self._after else []
