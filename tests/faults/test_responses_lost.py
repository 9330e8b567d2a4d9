"""Responses while a worker, a gateway or Redis dies in the middle of them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.cluster import Cluster, Crew, Recorded

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(90)]

WORDS = "one two three four five six"
SLOW = "first_delay_ms=0,delay_ms=5000"
"""A worker that is in the middle of its answer whenever one looks."""


def events_of(recorded: Recorded) -> list[Any]:
    return [json.loads(line) for line in recorded.lines]


def text_of(events: list[Any]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


def ask(crew: Crew, **fields: Any) -> Recorded:
    body = {"model": crew.model, "input": WORDS, "stream": True} | fields
    return crew.cluster.record(body, path="/v1/responses")


async def half_seen(recorded: Recorded, eventually: Any) -> str:
    """Until something of the answer has come. Returns the response's id."""
    await eventually(lambda: text_of(events_of(recorded)))
    return str(events_of(recorded)[0]["response"]["id"])


async def test_attempts_are_never_mixed(crew: Crew, eventually: Any) -> None:
    """Who watches hears that the answer is void; a resume from the middle of it is refused; the second answer is whole."""
    first = await crew.start(options=SLOW)
    recorded = ask(crew, background=True)
    response_id = await half_seen(recorded, eventually)
    crew.kill(first)
    await crew.start(options="delay_ms=200")
    await recorded.end()
    events = events_of(recorded)
    assert (events[-1]["type"], events[-1]["code"]) == ("error", "worker_lost")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    url = f"{crew.cluster.url}/v1/responses/{response_id}"
    # While the second attempt runs, and afterwards: the same.
    for _ in range(2):
        refused = await crew.cluster.http.get(url, params={"stream": "true", "starting_after": "4"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "response_restarted")
        again = await crew.cluster.http.get(url, params={"stream": "true"})
        told = [json.loads(line[6:]) for line in again.text.split("\n") if line.startswith("data: ")]
        assert [event["sequence_number"] for event in told] == list(range(len(told)))
        assert (told[-1]["type"], text_of(told)) == ("response.completed", WORDS)
    assert (await crew.cluster.http.get(url)).json() == told[-1]["response"]


async def test_a_death_before_the_first_word_is_not_seen(crew: Crew, eventually: Any) -> None:
    """A worker that dies before it said anything is a delay, streamed or not."""
    first = await crew.start(options="first_delay_ms=60000")
    recorded = [ask(crew, stream=stream) for stream in (True, False)]
    await eventually(lambda: crew.runs(2))
    crew.kill(first)
    await crew.start()
    await asyncio.gather(*(one.end() for one in recorded))
    events = events_of(recorded[0])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (events[-1]["type"], text_of(events)) == ("response.completed", WORDS)
    assert [event["type"] for event in events].count("response.in_progress") == 1
    answer = json.loads(recorded[1].body)
    assert answer["output"][0]["content"][0]["text"] == WORDS


async def test_what_nobody_could_see_does_not_go_on(crew: Crew, eventually: Any) -> None:
    """An unstored stream that was broken off is cancelled: its second answer would be for nobody."""
    first = await crew.start(options=SLOW)
    recorded = ask(crew, store=False)
    await half_seen(recorded, eventually)
    crew.kill(first)
    await crew.start(options="delay_ms=60000")
    await recorded.end()
    assert events_of(recorded)[-1]["type"] == "error"
    assert recorded.headers is not None
    job = recorded.headers["x-nexus-job-id"]

    async def cancelled() -> bool:
        return (await crew.cluster.get(f"/v1/jobs/{job}")).json()["status"] == "cancelled"

    await eventually(cancelled)


async def test_a_gateway_that_dies(cluster: Cluster, crew: Crew, eventually: Any) -> None:
    """A background response outlives the gateway that took it; its stream goes on at another one, without a gap."""
    await crew.start()
    gateway = await cluster.start_gateway()
    recorded = cluster.record(
        {"model": crew.model, "input": WORDS, "stream": True, "background": True, "echo": {"delay_ms": 200}},
        url=cluster.urls[-1],
        path="/v1/responses",
    )
    response_id = await half_seen(recorded, eventually)
    gateway.kill()
    await recorded.end()
    seen = events_of(recorded)
    params = {"stream": "true", "starting_after": str(seen[-1]["sequence_number"])}
    rest = await cluster.get(f"/v1/responses/{response_id}", params=params)
    told = [*seen, *(json.loads(line[6:]) for line in rest.text.split("\n") if line.startswith("data: "))]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert (told[-1]["type"], text_of(told)) == ("response.completed", WORDS)


async def test_a_gateway_that_stops(cluster: Cluster, crew: Crew, eventually: Any) -> None:
    """On SIGTERM callers are told, never cut off in silence: the stream by an `error` event, the others by a 503."""
    await crew.start()
    gateway = await cluster.start_gateway(GATEWAY_DRAIN_S="1")
    body: dict[str, Any] = {"model": crew.model, "input": WORDS, "echo": {"delay_ms": 2000, "first_delay_ms": 0}}
    recorded = [
        cluster.record(body | {"stream": stream}, url=cluster.urls[-1], path="/v1/responses")
        for stream in (True, False)
    ]
    await half_seen(recorded[0], eventually)
    await eventually(lambda: crew.runs(2))
    assert await gateway.stop(15) == 0
    stream, whole = [await one.end() for one in recorded]
    last = events_of(stream)[-1]
    assert (last["type"], last["code"]) == ("error", "unavailable")
    assert whole.status == 503
    assert whole.error is not None
    assert whole.error["code"] == "unavailable"
    # The one whose caller will ask again has ended, the other one can be retrieved.
    await eventually(lambda: crew.runs(1))
    answer = await cluster.get(f"/v1/responses/{events_of(stream)[0]['response']['id']}")
    assert answer.json()["status"] == "in_progress"


async def test_redis_dies_meanwhile(cluster: Cluster, crew: Crew, eventually: Any) -> None:
    """What runs is answered without Redis, streamed or not; new ones are refused with a 503 until it is back."""
    await crew.start(options="first_delay_ms=0,delay_ms=400")
    recorded = [ask(crew, stream=stream) for stream in (True, False)]
    await half_seen(recorded[0], eventually)
    await eventually(lambda: crew.runs(2))
    cluster.redis.kill()
    try:
        stream, whole = [await one.end() for one in recorded]
        events = events_of(stream)
        assert (events[-1]["type"], text_of(events)) == ("response.completed", WORDS)
        assert json.loads(whole.body)["output"][0]["content"][0]["text"] == WORDS
        refused = await cluster.post("/v1/responses", {"model": crew.model, "input": "hi"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    finally:
        await cluster.redis.start()

    async def answered() -> bool:
        return (await cluster.post("/v1/responses", {"model": crew.model, "input": "hi"})).status_code == 200

    await eventually(answered)
