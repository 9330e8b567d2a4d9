"""Following a job's events, from any gateway: what is kept, then what comes, then how it ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import structlog

from backbone.bus.blobs import Blobs
from backbone.bus.job_log import Decision, JobLog, StoredEvent
from gateway.jobs.assembly import Assembly, Piece
from gateway.jobs.attempts import counted
from gateway.jobs.base import EventsExpired, JobEvent
from gateway.jobs.records import ended
from gateway.jobs.shape import shape_json
from schemas.durable import EventId, JobEventKind, decode_durable
from schemas.errors import InvalidRequest
from schemas.events import BlobRef
from schemas.jobs import TERMINAL, JobRecord, JobStatus

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


class Follower:
    """One caller's view of one job's events."""

    def __init__(self, jobs: JobLog, blobs: Blobs, record: JobRecord, after: str, *, every: bool = False) -> None:
        """`every`: attempts that were given up are told too."""
        self._every = every
        self._log = jobs
        self._blobs = blobs
        self._record = record
        self._after = parse_after(after)
        self._assembly = Assembly(self._after)
        self._seq = 0
        """Of the newest stored event that was read."""

    async def events(self) -> AsyncGenerator[JobEvent | None, None]:
        """See `gateway.jobs.base.Jobs.watch`."""
        decision, caught_up = None, False
        ended_by = await self._decision() if self._record.status is JobStatus.COMPLETED else None
        if ended_by is not None and not self._every:
            self._assembly = Assembly(self._after, only=ended_by.word.token)
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
                if self._record.status in TERMINAL:
                    raise EventsExpired("how this job ended is not kept any more")
        if decision is None:
            return
        # Whatever the deciding attempt stored was there before its word: one more look finds all of it.
        async with aclosing(self._rest(self._seq)) as rest:
            async for event in rest:
                yield event
        word = decision.word
        if word.status is JobStatus.COMPLETED and not self._assembly.is_whole(word.token, word.events):
            # The attempt that ended the job, from its beginning: another one had begun before its word was there.
            self._after = EventId(0, 0, 0)
            self._assembly = Assembly(only=word.token, again=True)
            async with aclosing(self._rest()) as rest:
                async for event in rest:
                    yield event
        end = self._end(decision)
        if self._after != self._assembly.end_id():
            yield end

    async def _read(self, behind: int = 0) -> AsyncGenerator[JobEvent | None, None]:
        """What there is to tell of events stored behind a sequence; None: there are no more for now."""
        async with aclosing(self._log.events(self._record.id, behind)) as stored:
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

    def _feed(self, event: StoredEvent) -> list[Piece]:
        self._seq = event.seq
        try:
            return self._assembly.feed(decode_durable(event.data))
        except ValueError:
            log.exception("malformed event", job=self._record.id)
            return []

    async def _decision(self) -> Decision | None:
        decision = await self._log.decided(self._record.id)
        newest = max(self._record.run, self._assembly.run)
        if decision is None or decision.word.run < newest:
            return None
        return decision._replace(word=await counted(self._log, decision.word))

    async def _tell(self, piece: Piece) -> JobEvent:
        run, delivery, seq = piece.id
        data = piece.data
        if piece.by_ref:
            name = BlobRef.model_validate_json(data).name
            data = b"".join([part async for part in self._blobs.read(name)])
        elif piece.kind is JobEventKind.QUEUED:
            data = shape_json(JobRecord.model_validate_json(data))
        return JobEvent(piece.kind, f"{run}-{delivery}-{seq}", data)

    def _end(self, decision: Decision) -> JobEvent:
        word = decision.word
        if word.status is JobStatus.COMPLETED and not self._assembly.is_whole(word.token, word.events):
            raise EventsExpired("some events of this job are not kept any more; its result is, at …/result")
        run, delivery, seq = self._assembly.end_id()
        data = shape_json(ended(self._record, word, decision.stored_at))
        return JobEvent(TERMINAL_EVENT[word.status], f"{run}-{delivery}-{seq}", data, word)
