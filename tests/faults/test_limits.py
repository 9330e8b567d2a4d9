"""Nothing waits without a bound: full queues, time limits, backends that fail in every way, models without workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.backends.doubles.openai import OpenAIDouble
from tests.cluster import Cluster, Crew, Recorded
from tests.conftest import Eventually
from tests.faults.conftest import SETTINGS

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMITS: dict[str, Any] = {"MAX_QUEUED_PER_MODEL": "20"}  # beside the one that is next to start
IMPATIENT = {
    "FIRST_TOKEN_TIMEOUT_S": "2",
    "IDLE_TIMEOUT_S": "1",
    "QUEUE_TIMEOUT_S": "2",
    "QUEUE_COMMENT_AFTER_S": "0.3",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """A cluster with short queues."""
    async with Cluster(tmp_path_factory.mktemp("limits"), **SETTINGS, **LIMITS) as cluster:
        await cluster.start_gateway()
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def impatient(cluster: Cluster) -> str:
    """The URL of one more gateway, with short times: what should not run out of them asks the other one."""
    await cluster.start_gateway(**IMPATIENT)
    return cluster.urls[-1]


async def serves(crew: Crew, url: str) -> bool:
    """Whether the gateway there knows the crew's model."""
    models = (await crew.cluster.http.get(url + "/v1/models")).json()["data"]
    return any(entry["id"] == crew.model for entry in models)


def code(answer: Recorded) -> tuple[int | None, str | None, str | None]:
    """Status, and the error's type and code."""
    error = answer.error or {}
    return answer.status, error.get("type"), error.get("code")


async def test_backend_hangs(crew: Crew, impatient: str, eventually: Eventually) -> None:
    """A backend that falls silent before its first token is a 504; after it, the stream ends in an error frame."""
    await crew.start()
    await eventually(lambda: serves(crew, impatient))
    whole, stream, midway, unseen = (
        crew.ask(echo={"fail": "hang"}, url=impatient),
        crew.stream(echo={"fail": "hang"}, url=impatient),
        crew.stream(echo={"fail": "hang_mid", "tokens": 4}, url=impatient),
        crew.ask(echo={"fail": "hang_mid", "tokens": 4}, url=impatient),
    )
    for answer in (whole, stream, unseen):
        await answer.end()
        assert code(answer) == (504, "timeout_error", "timeout")
        assert answer.headers is not None
        assert answer.headers["x-should-retry"] == "false"
    await midway.end()
    assert midway.status == 200
    assert len(midway.texts) == 2
    assert "[DONE]" not in midway.lines
    assert code(midway)[1:] == ("timeout_error", "timeout")
    await eventually(lambda: crew.idle())


FAILED = (502, "backend_error", "backend_error")
OUTCOMES = {
    "before": FAILED,
    "error": FAILED,
    "drop": FAILED,
    "crash": FAILED,
    "mid": FAILED,
    "refuse": (400, "invalid_request_error", None),
    "unavailable": (503, "server_error", "backend_unavailable"),
}
BEGUN = {"drop", "crash", "mid"}
"""Failures that come after the first tokens."""


async def test_backend_fails(crew: Crew, eventually: Eventually) -> None:
    """Each way in which a backend fails has its own status, also for a stream that has not begun; a begun one ends in an error."""
    await crew.start()
    whole = {fail: crew.ask(echo={"fail": fail}) for fail in OUTCOMES}
    streams = {fail: crew.stream(echo={"fail": fail}) for fail in OUTCOMES}
    await asyncio.gather(*(answer.end() for answer in [*whole.values(), *streams.values()]))
    assert {fail: code(answer) for fail, answer in whole.items()} == OUTCOMES
    begun = {fail: (200, *OUTCOMES[fail][1:]) for fail in BEGUN}
    assert {fail: code(answer) for fail, answer in streams.items()} == OUTCOMES | begun
    assert [answer.body for answer in streams.values() if "[DONE]" in answer.body] == []
    await eventually(crew.idle)


async def test_passing_failure(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """A backend that fails once in passing is asked again, and the caller sees nothing of it."""
    worker = await crew.start()
    answer = await crew.stream(echo={"fail": "before", "fail_times": 1}).end()
    assert answer.complete
    assert "".join(answer.texts) == "hello there"
    await eventually(lambda: len(cluster.attempts(worker)) == 2)
    assert [attempt["outcome"] for attempt in cluster.attempts(worker)] == ["returned", "completed"]


async def test_backend_down_and_back(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """A backend dies: callers get clear errors. It comes back: they are served, with nothing restarted."""
    async with OpenAIDouble() as double:
        double.behave(models=({"id": crew.model, "object": "model", "created": 7, "owned_by": "tests"},))
        worker = await crew.start(backend="openai", WORKER_BACKEND_URL=double.url)
        assert (await crew.ask().end()).status == 200
        double.behave(models=double.behavior.models, token_delay_s=0.2, words=("word",) * 100)
        midway = crew.stream()
        await eventually(lambda: midway.texts)
        await double.kill()
        await midway.end()
        assert midway.error is not None
        assert "[DONE]" not in midway.lines
        refused = await crew.ask().end()
        assert refused.status in {502, 503}
        assert refused.error is not None
        await cluster.wait_for_worker(worker, "unhealthy")
        refused = await crew.ask().end()
        assert code(refused) == (503, "server_error", "unavailable")
        assert refused.headers is not None
        assert "retry-after" in refused.headers
        double.behave(models=double.behavior.models)
        await double.start()
        await cluster.wait_for_worker(worker, "ready")
        assert (await crew.ask().end()).status == 200


async def test_queue_full(crew: Crew, eventually: Eventually) -> None:
    """A full queue refuses with 429 `queue_full` and `Retry-After`, and takes requests again when there is room."""
    await crew.start(WORKER_CONCURRENCY="1")
    running = crew.ask(echo={"first_delay_ms": 60000})
    await eventually(lambda: crew.runs(1))
    waiting = []
    for count in range(1, 22):
        waiting.append(crew.ask(stream=bool(count % 2)))
        await eventually(lambda count=count: crew.waits(count))
    for refused in (crew.ask(), crew.stream()):
        await refused.end()
        assert code(refused) == (429, "rate_limit_error", "queue_full")
        assert refused.headers is not None
        assert int(refused.headers["retry-after"]) >= 1
    await running.hang_up()
    await asyncio.gather(*(answer.end() for answer in waiting))
    assert [answer.status for answer in waiting] == [200] * 21
    assert (await crew.ask().end()).status == 200


async def test_queued_for_too_long(crew: Crew, impatient: str, eventually: Eventually) -> None:
    """Who waits sees `: queued position=N` in the stream; who waits too long gets 504, or an error frame in a begun stream."""
    await crew.start(WORKER_CONCURRENCY="1")
    await eventually(lambda: serves(crew, impatient))
    running = crew.stream(echo={"first_delay_ms": 60000})
    await eventually(lambda: crew.runs(1))
    first = crew.stream(url=impatient)
    await eventually(lambda: first.comments)
    second = crew.ask(url=impatient)
    await asyncio.gather(first.end(), second.end())
    assert first.comments[0] == ": queued position=0"
    assert first.status == 200
    assert "[DONE]" not in first.lines
    assert code(first)[1:] == ("timeout_error", "queue_timeout")
    assert code(second) == (504, "timeout_error", "queue_timeout")
    assert not running.ended
    await running.hang_up()
    await eventually(lambda: crew.idle())


async def test_nobody_serves_it(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """A model that never was is 404; one whose workers have all gone is 503 with `Retry-After`, until one is back."""
    unknown = await crew.ask().end()
    assert code(unknown) == (404, "invalid_request_error", "model_not_found")
    name = await crew.start()
    assert (await crew.ask().end()).status == 200
    crew.kill(name)
    await cluster.wait_for_worker(name, None)
    gone = await crew.ask().end()
    assert code(gone) == (503, "server_error", "unavailable")
    assert gone.headers is not None
    assert int(gone.headers["retry-after"]) >= 1
    await crew.start()
    assert (await crew.ask().end()).status == 200
