"""Streams a response's events, built from its job's events: stored events, then new ones, of a single attempt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from gateway import clock
from gateway.jobs.api import EventsExpired, JobEvent, JobNotFound, JobResult, JobsApi
from gateway.jobs.http_response import result_error
from gateway.responses.from_chat import ResponseBuilder, ResponseEvent
from gateway.responses.repository import CreatedResponse
from gateway.responses.resource import unanswered_response
from schemas.errors import ErrorInfo, InvalidRequest, NexusError, NotFound
from schemas.frames import AdaptedParameters
from schemas.job_events import JobEventKind
from schemas.jobs import JobStatus
from schemas.outcome import Outcome

JSON = dict[str, Any]

RESTARTED = "The worker was lost, and the response starts again from the beginning; "
EXPIRED = "The events of this response have been deleted after their retention time. Retrieve it without 'stream'."


class ResponseRestarted(InvalidRequest):
    """The response was restarted, so the events received so far are void. Retrieve it from the beginning."""

    code = "response_restarted"


async def job_finished_at(jobs: JobsApi, owner: str, job: str) -> int:
    """Return when a job ended, in Unix seconds, or the current time if that is unknown."""
    with suppress(NexusError):
        if (at := (await jobs.get(owner, job)).finished_at) is not None:
            return at
    return int(clock.now())


class ResponseEventStream:
    """Streams the events of one response to one caller."""

    def __init__(
        self,
        jobs: JobsApi,
        created: CreatedResponse,
        after: int,
        store_final: Callable[[CreatedResponse, JSON], Awaitable[JSON]],
        read_result: Callable[[CreatedResponse], Awaitable[tuple[JobResult, bytes]]],
    ) -> None:
        """Create a stream.

        Args:
            jobs: The jobs service.
            created: The response.
            after: The number of the last event that the caller received. -1: none.
            store_final: Stores the final response and returns the stored one.
            read_result: Returns the job's result and its body. Raises NotFound.
        """
        self._jobs = jobs
        self._created = created
        self._after = after
        self._store_final = store_final
        self._read_result = read_result
        self._builder = ResponseBuilder(created.initial)
        self._buffered: list[ResponseEvent] | None = []
        """Stored events of an attempt that may be superseded. None once all stored events are read."""
        self._ended = False
        self.adapted: tuple[str, ...] = ()
        """Request parameters that were replaced by their nearest equivalent."""
        self.interrupted = False
        """Whether this stream ended although the response continues."""
        self.error: ErrorInfo | None = None
        """The response's error, set when the events have ended."""

    async def events(self) -> AsyncGenerator[list[ResponseEvent], None]:
        """Yield the first events; then all other stored events, possibly none; then new events as they arrive.

        If a later attempt supersedes the current one, the stream ends with an `error` event. Raises Unavailable. Raises
        before the stored events: ResponseRestarted if the caller holds events of a superseded attempt, EventsExpired,
        JobNotFound.
        """
        yield self._unseen(self._builder.created_events())
        try:
            async with aclosing(self._jobs.follow_all_attempts(self._created.owner, self._created.job)) as stream:
                async for event in stream:
                    if event is None:
                        buffered, self._buffered = self._buffered or [], None
                        yield buffered
                    elif events := await self._handle(event):
                        yield events
                    if self._ended:
                        return
        except (EventsExpired, JobNotFound):
            if self._buffered is None:
                raise
            yield await self._replay_result()

    async def _replay_result(self) -> list[ResponseEvent]:
        """Return all events, rebuilt from the job's result, which is stored longer than its events."""
        try:
            result, data = await self._read_result(self._created)
        except NotFound:
            raise EventsExpired(EXPIRED) from None
        outcome = result.outcome
        if outcome.status is not JobStatus.COMPLETED:
            raise EventsExpired(EXPIRED)
        fresh = ResponseBuilder(self._created.initial)
        fresh.created_events()
        if self._after > fresh.next_number and (outcome.delivery > 1 or outcome.run > 1):
            raise ResponseRestarted  # the caller may hold events of another attempt, which are no longer stored
        self._builder, self._buffered = fresh, None
        events = [*fresh.in_progress_events(), *fresh.add_frames(data)]
        return [*self._unseen(events), *await self._end(outcome)]

    def interruption_event(self, info: ErrorInfo) -> ResponseEvent:
        """Return the `error` event that ends this stream while the response may continue."""
        return self._builder.error_event(info.code, info.public_message)

    async def _handle(self, event: JobEvent) -> list[ResponseEvent]:
        builder = self._builder
        if event.outcome is not None:
            return await self._end(event.outcome)
        if event.kind is JobEventKind.CHUNK:
            return self._emit(builder.add_frames(event.data))
        if event.kind is JobEventKind.ADAPTED:
            self.adapted = AdaptedParameters.model_validate_json(event.data).parameters
        if event.kind is JobEventKind.STARTED:
            return self._emit(builder.in_progress_events())
        if event.kind in (JobEventKind.RESTARTED, JobEventKind.QUEUED):
            return self._start_over(event.kind)
        return []

    def _start_over(self, kind: JobEventKind) -> list[ResponseEvent]:
        """Start over because another attempt or run voids the events of the last one."""
        if self._builder.has_output:
            if self._buffered is None:
                self._ended = self.interrupted = True
                advice = "send the request again" if self._created.stored is None else "retrieve the response again"
                return self._emit([self._builder.error_event("worker_lost", RESTARTED + advice)])
            fresh = ResponseBuilder(self._created.initial)
            fresh.created_events()
            if self._after > fresh.next_number:
                raise ResponseRestarted
            fresh.in_progress_events()
            self._builder = fresh
            self._buffered = [event for event in self._buffered if event.number < fresh.next_number]
        return self._emit(self._builder.in_progress_events()) if kind is JobEventKind.RESTARTED else []

    async def _end(self, outcome: Outcome) -> list[ResponseEvent]:
        self._ended = True
        builder, created = self._builder, self._created
        buffered, self._buffered = self._buffered or [], None
        if outcome.status is JobStatus.COMPLETED:
            events = builder.close_items(outcome.usage.model_dump() if outcome.usage is not None else None)
            final = builder.final_response(await job_finished_at(self._jobs, created.owner, created.job))
        else:
            self.error = result_error(JobResult(outcome, b"", None, ""))
            events, final = [], unanswered_response(created.initial, outcome.status, self.error)
        final = await self._store_final(created, final)
        return [*buffered, *self._unseen([*events, builder.final_event(final)])]

    def _emit(self, events: list[ResponseEvent]) -> list[ResponseEvent]:
        wanted = self._unseen(events)
        if self._buffered is None:
            return wanted
        self._buffered += wanted
        return []

    def _unseen(self, events: list[ResponseEvent]) -> list[ResponseEvent]:
        return [event for event in events if event.number > self._after]
