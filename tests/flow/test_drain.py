"""Workers and gateways that are told to leave."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster import Cluster, Crew
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS = {"delay_ms": 100, "first_delay_ms": 0, "tokens": 30}


async def gone(cluster: Cluster, name: str) -> bool:
    return name not in await cluster.listed()


async def test_sigterm(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """On SIGTERM a worker leaves the registry at once, finishes its stream, takes no more, and exits with 0."""
    name = await crew.start()
    stream = crew.stream(echo=TOKENS)
    await eventually(lambda: stream.texts)
    cluster.workers[name].terminate()
    await eventually(lambda: gone(cluster, name))
    assert not stream.ended, "it left the registry before its work was done"
    other = await crew.start()
    assert (await crew.ask().end()).status == 200
    assert await asyncio.wait_for(cluster.workers[name].wait(), 30) == 0
    assert (await stream.end()).complete
    assert len(stream.texts) == 30
    await eventually(lambda: cluster.attempts(other))
    assert [attempt["outcome"] for attempt in cluster.attempts(name)] == ["completed"]


async def test_drained_over_http(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """`POST /v1/workers/{id}/drain` does the same from afar; a worker that is not there is 404."""
    name = await crew.start()
    stream = crew.stream(echo=TOKENS)
    await eventually(lambda: stream.texts)
    response = await cluster.post(f"/v1/workers/{name}/drain", None)
    assert response.status_code == 202
    await eventually(lambda: gone(cluster, name))
    assert await asyncio.wait_for(cluster.workers[name].wait(), 30) == 0
    assert (await stream.end()).complete
    again = await cluster.post(f"/v1/workers/{name}/drain", None)
    assert again.status_code == 404
    assert again.json()["error"]["code"] == "worker_not_found"


async def test_time_runs_out(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """What a leaving worker cannot finish goes to another one: who has seen nothing yet sees a delay, who has sees an error."""
    name = await crew.start(options="first_delay_ms=60000", WORKER_DRAIN_S="0.5")
    unseen = [crew.ask(), crew.stream()]
    seen = crew.stream(echo={"first_delay_ms": 0, "delay_ms": 1000, "tokens": 60})
    await eventually(lambda: seen.texts)
    await eventually(lambda: crew.runs(3))
    await crew.start()
    cluster.workers[name].terminate()
    assert await asyncio.wait_for(cluster.workers[name].wait(), 30) == 0
    await asyncio.gather(*(answer.end() for answer in [*unseen, seen]))
    assert unseen[0].text == "hello there"
    assert unseen[1].complete
    assert seen.error is not None
    assert "[DONE]" not in seen.lines
    await eventually(crew.idle)
