"""A response's events, from its job's: those that are kept, then those to come, one attempt's alone."""

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

RESTARTED = "this answer broke off in the middle, and is begun anew; "
EXPIRED = "the events of this response are not kept any more; retrieve it without 'stream'"


class ResponseRestarted(InvalidRequest):
    """What you have of this response is void: it was begun anew. Retrieve it from the beginning."""

    code = "response_restarted"


async def job_finished_at(jobs: JobsApi, owner: str, job: str) -> int:
    """When a job ended, in Unix seconds, as well as is known."""
    with suppress(NexusError):
        if (at := (await jobs.get(owner, job)).finished_at) is not None:
            return at
    return int(clock.now())


class ResponseEventStream:
    """One caller's view of one response."""

    def __init__(
        self,
        jobs: JobsApi,
        made: CreatedResponse,
        after: int,
        finished: Callable[[CreatedResponse, JSON], Awaitable[JSON]],
        look_up: Callable[[CreatedResponse], Awaitable[tuple[JobResult, bytes]]],
    ) -> None:
        """`after`: the caller has had the events up to this number. `finished` keeps the final response, and returns the one
        that is kept. `look_up`: how the job ended, and its answer; raises NotFound.
        """
        self._jobs = jobs
        self._made = made
        self._after = after
        self._finished = finished
        self._look_up = look_up
        self._answering = ResponseBuilder(made.shell)
        self._held: list[ResponseEvent] | None = []
        """What an attempt said that may be void by now; None: from now on every event is new."""
        self._over = False
        self.adapted: tuple[str, ...] = ()
        """Parameters of the request that were replaced by their nearest equivalent."""
        self.broke_off = False
        """The response goes on, but not here."""
        self.error: ErrorInfo | None = None
        """Why there is no answer, once the events have ended."""

    async def events(self) -> AsyncGenerator[list[ResponseEvent], None]:
        """The first events; then all others that are kept, perhaps none; then those to come, some at a time.

        Before the kept ones, raises ResponseRestarted where the caller has events of an attempt that was given up,
        EventsExpired, JobNotFound. An attempt that is given up later ends it with an `error` event. Raises Unavailable.
        """
        yield self._wanted(self._answering.created())
        try:
            async with aclosing(self._jobs.follow_all_attempts(self._made.owner, self._made.job)) as stream:
                async for event in stream:
                    if event is None:
                        held, self._held = self._held or [], None
                        yield held
                    elif events := await self._take(event):
                        yield events
                    if self._over:
                        return
        except (EventsExpired, JobNotFound):
            if self._held is None:
                raise
            yield await self._retold()

    async def _retold(self) -> list[ResponseEvent]:
        """All from the job's answer, which is kept longer than its events."""
        try:
            result, data = await self._look_up(self._made)
        except NotFound:
            raise EventsExpired(EXPIRED) from None
        word = result.word
        if word.status is not JobStatus.COMPLETED:
            raise EventsExpired(EXPIRED)
        fresh = ResponseBuilder(self._made.shell)
        fresh.created()
        if self._after > fresh.next_number and (word.delivery > 1 or word.run > 1):
            raise ResponseRestarted  # perhaps; what was said by then is not known any more
        self._answering, self._held = fresh, None
        events = [*fresh.started(), *fresh.frames(data)]
        return [*self._wanted(events), *await self._end(word)]

    def broken(self, info: ErrorInfo) -> ResponseEvent:
        """The event that says why there are no more, while the response may go on."""
        return self._answering.error(info.code, info.public_message)

    async def _take(self, event: JobEvent) -> list[ResponseEvent]:
        answering = self._answering
        if event.word is not None:
            return await self._end(event.word)
        if event.kind is JobEventKind.CHUNK:
            return self._tell(answering.frames(event.data))
        if event.kind is JobEventKind.ADAPTED:
            self.adapted = AdaptedParameters.model_validate_json(event.data).parameters
        if event.kind is JobEventKind.STARTED:
            return self._tell(answering.started())
        if event.kind in (JobEventKind.RESTARTED, JobEventKind.QUEUED):
            return self._restart(event.kind)
        return []

    def _restart(self, kind: JobEventKind) -> list[ResponseEvent]:
        """Another attempt begins, or another run: what the last one said is void."""
        if self._answering.shown:
            if self._held is None:
                self._over = self.broke_off = True
                advice = "send the request again" if self._made.kept is None else "retrieve the response again"
                return self._tell([self._answering.error("worker_lost", RESTARTED + advice)])
            fresh = ResponseBuilder(self._made.shell)
            fresh.created()
            if self._after > fresh.next_number:
                raise ResponseRestarted
            fresh.started()
            self._answering = fresh
            self._held = [event for event in self._held if event.number < fresh.next_number]
        return self._tell(self._answering.started()) if kind is JobEventKind.RESTARTED else []

    async def _end(self, word: Outcome) -> list[ResponseEvent]:
        self._over = True
        answering, made = self._answering, self._made
        held, self._held = self._held or [], None
        if word.status is JobStatus.COMPLETED:
            events = answering.closed(word.usage.model_dump() if word.usage is not None else None)
            final = answering.response(await job_finished_at(self._jobs, made.owner, made.job))
        else:
            self.error = result_error(JobResult(word, b"", None, ""))
            events, final = [], unanswered_response(made.shell, word.status, self.error)
        final = await self._finished(made, final)
        return [*held, *self._wanted([*events, answering.last(final)])]

    def _tell(self, events: list[ResponseEvent]) -> list[ResponseEvent]:
        wanted = self._wanted(events)
        if self._held is None:
            return wanted
        self._held += wanted
        return []

    def _wanted(self, events: list[ResponseEvent]) -> list[ResponseEvent]:
        return [event for event in events if event.number > self._after]
