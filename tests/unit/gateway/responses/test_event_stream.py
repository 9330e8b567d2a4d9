"""A response's events from its job's: one attempt's alone, the same for everybody, from any number on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest

from gateway.http.request_body import validate_body
from gateway.jobs.api import EventsExpired, JobEvent, JobNotFound, JobResult
from gateway.responses.event_stream import ResponseEventStream, ResponseRestarted
from gateway.responses.from_chat import ResponseEvent
from gateway.responses.repository import CreatedResponse, ResponseDocument, StoredResponse
from gateway.responses.resource import initial_response
from schemas.errors import BackendFailed
from schemas.job_events import JobEventKind
from schemas.jobs import Capability, JobStatus
from schemas.openai.responses import ResponsesRequest
from schemas.outcome import Outcome

pytestmark = pytest.mark.asyncio

JOB = "job_" + "0" * 32
NOW = None
"""What comes after it is new."""
LOST = JobEvent(JobEventKind.CHUNK, "", b"")
"""Here events are missing."""


class ScriptedJobs:
    """A jobs service with scripted events and no record."""

    def __init__(self, *events: JobEvent | None) -> None:
        self._events = events

    async def follow_all_attempts(self, owner: str, job_id: str) -> AsyncGenerator[JobEvent | None, None]:
        for event in self._events:
            if event is LOST:
                raise EventsExpired
            yield event

    async def get(self, owner: str, job_id: str) -> Any:
        raise JobNotFound


def told(kind: JobEventKind, data: bytes = b"{}", outcome: Outcome | None = None) -> JobEvent:
    return JobEvent(kind, "1-1-0", data, outcome)


QUEUED, STARTED, RESTARTED = (
    told(JobEventKind.QUEUED),
    told(JobEventKind.STARTED),
    told(JobEventKind.RESTARTED),
)


def chunk(text: str, finish: str | None = None) -> JobEvent:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return told(JobEventKind.CHUNK, b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n")


def end(status: JobStatus = JobStatus.COMPLETED, **fields: Any) -> JobEvent:
    outcome = Outcome(
        job=JOB, status=status, owner="me", endpoint="/v1/responses", capability=Capability.CHAT, model="m",
        public_model="m", **fields,
    )  # fmt: skip
    return told(JobEventKind.COMPLETED, outcome=outcome)


def created(*, stored: bool = True, **fields: Any) -> CreatedResponse:
    began_as = initial_response(
        validate_body({"model": "m", "input": "hi"} | fields, ResponsesRequest), JOB, 1_800_000_000
    )
    record = StoredResponse("me", b"", ResponseDocument(job=JOB), began_as, None) if stored else None
    return CreatedResponse("me", JOB, began_as, record, bound_to_connection=not stored)


async def store_final(_: CreatedResponse, final: dict[str, Any]) -> dict[str, Any]:
    return final | {"completed_at": 7}


async def no_answer(_: CreatedResponse) -> Any:
    raise JobNotFound


def watch(
    *events: JobEvent | None, after: int = -1, stored: bool = True, read_result: Any = no_answer, **fields: Any
) -> ResponseEventStream:
    return ResponseEventStream(ScriptedJobs(*events), created(stored=stored, **fields), after, store_final, read_result)  # type: ignore[arg-type]


async def seen(watching: ResponseEventStream) -> list[ResponseEvent]:
    return [event async for some in watching.events() for event in some]


def text(events: list[ResponseEvent]) -> str:
    return "".join(event.body["delta"] for event in events if "delta" in event.body)


FIRST = (QUEUED, STARTED, chunk("a "), chunk("b "))
SECOND = (RESTARTED, chunk("a "), chunk("b ", "stop"), end())


async def test_live_and_later_are_the_same() -> None:
    """Who is there from the start, comes in between or looks afterwards sees the same events."""
    whole = (*FIRST, chunk("c", "stop"), end())
    views = [await seen(watch(*whole[:at], NOW, *whole[at:])) for at in range(len(whole) + 1)]
    assert all(view == views[0] for view in views)
    assert text(views[0]) == "a b c"
    assert views[0][-1].body["response"]["completed_at"] == 7
    for after in range(-1, len(views[0]) + 1):
        assert await seen(watch(*whole[:4], NOW, *whole[4:], after=after)) == views[0][after + 1 :]


async def test_a_restart_before_any_output() -> None:
    """An attempt without output leaves no trace, and the numbers continue."""
    events = await seen(watch(QUEUED, NOW, STARTED, RESTARTED, RESTARTED, chunk("a", "stop"), end()))
    assert [event.number for event in events] == list(range(len(events)))
    assert [event.kind for event in events].count("response.in_progress") == 1
    assert events == await seen(watch(QUEUED, STARTED, chunk("a", "stop"), end(), NOW))


async def test_a_restart_that_was_seen() -> None:
    """A caller that received output gets an error event, and no events of the next attempt."""
    watching = watch(QUEUED, NOW, STARTED, chunk("a "), *SECOND)
    events = await seen(watching)
    assert text(events) == "a "
    assert (events[-1].kind, events[-1].body["code"]) == ("error", "worker_lost")
    assert "retrieve" in events[-1].body["message"]
    assert watching.interrupted
    lost = await seen(watch(QUEUED, NOW, STARTED, chunk("a "), *SECOND, stored=False))
    assert "send the request again" in lost[-1].body["message"]


async def test_a_restart_of_old() -> None:
    """Who comes later gets the second attempt alone, numbered from 0, whether it still runs or has ended."""
    alone = await seen(watch(QUEUED, STARTED, *SECOND[1:], NOW))
    for view in (
        watch(*FIRST, *SECOND, NOW),
        watch(*FIRST, *SECOND),  # it was complete when we came
        watch(*FIRST, RESTARTED, NOW, *SECOND[1:]),
        watch(*FIRST, *SECOND[:2], NOW, *SECOND[2:]),
        watch(*FIRST, RESTARTED, chunk("x"), *SECOND, NOW),
    ):
        assert await seen(view) == alone


@pytest.mark.parametrize("background", [False, True])
async def test_a_resume_over_a_restart(background: bool) -> None:
    """Going on from the middle of a void attempt is refused; from before it, it is not."""
    before = 2 if background else 1
    for after in range(before + 1, before + 6):
        with pytest.raises(ResponseRestarted):
            await seen(watch(*FIRST, *SECOND, NOW, after=after, background=background))
    alone = await seen(watch(*FIRST, *SECOND, NOW, background=background))
    for after in range(before + 1):
        rest = await seen(watch(*FIRST, *SECOND, NOW, after=after, background=background))
        assert rest == alone[after + 1 :]


async def test_a_retry() -> None:
    """A new run of a failed job is another attempt."""
    events = await seen(watch(*FIRST, QUEUED, STARTED, chunk("x", "stop"), end(run=2), NOW))
    assert text(events) == "x"


async def test_ends_without_an_answer() -> None:
    """A failure, a cancellation and an expiry end the stream, each with the final response; the error is known."""
    failing = watch(*FIRST, NOW, end(JobStatus.FAILED, error=BackendFailed("broken").info))
    events = await seen(failing)
    assert (events[-1].kind, events[-1].body["response"]["status"]) == ("response.failed", "failed")
    assert text(events) == "a b "
    assert failing.error is not None
    assert failing.error.message == "broken"
    queued = await seen(watch(QUEUED, NOW, end(JobStatus.CANCELLED), background=True))
    assert [event.kind for event in queued] == ["response.created", "response.queued", "response.failed"]
    assert queued[-1].body["response"]["status"] == "cancelled"
    late = await seen(watch(QUEUED, NOW, end(JobStatus.EXPIRED)))
    assert late[-1].body["response"]["error"]["code"] == "server_error"


async def test_stored_events_come_before_new_ones() -> None:
    """Stored events are sent as soon as they are known to be valid, without waiting for a new one."""
    more = asyncio.Event()

    class Waiting(ScriptedJobs):
        async def follow_all_attempts(self, owner: str, job_id: str) -> AsyncGenerator[JobEvent | None, None]:
            async for event in super().follow_all_attempts(owner, job_id):
                yield event
            await more.wait()

    events = ResponseEventStream(Waiting(*FIRST, NOW), created(), -1, store_final, no_answer).events()  # type: ignore[arg-type]
    assert [event.kind for event in await anext(events)] == ["response.created"]
    assert text(await anext(events)) == "a b "
    await events.aclose()


async def test_when_events_have_been_deleted() -> None:
    """The result, which is stored longer, yields the same events; without it they have expired."""
    whole = (*FIRST, chunk("c", "stop"), end())
    told_then = await seen(watch(*whole))
    frames = b"".join(event.data for event in whole if event.kind is JobEventKind.CHUNK)

    def stored(**fields: Any) -> Any:
        async def read_result(_: CreatedResponse) -> Any:
            outcome = end(**fields).outcome
            assert outcome is not None
            return JobResult(outcome, b"", None, ""), frames

        return read_result

    for after in range(-1, len(told_then)):
        assert await seen(watch(QUEUED, LOST, after=after, read_result=stored())) == told_then[after + 1 :]
    assert await seen(watch(LOST, read_result=stored(delivery=2))) == told_then
    with pytest.raises(ResponseRestarted):  # which attempt the caller has had events of cannot be known
        await seen(watch(LOST, after=4, read_result=stored(delivery=2)))
    for read_result in (no_answer, stored(status=JobStatus.FAILED)):
        with pytest.raises(EventsExpired, match="without 'stream'"):
            await seen(watch(LOST, read_result=read_result))
    with pytest.raises(EventsExpired):
        await seen(watch(*FIRST, NOW, LOST, read_result=stored()))
