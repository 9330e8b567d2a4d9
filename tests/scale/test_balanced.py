"""Gateways behind a load balancer."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.cluster import Cluster, chat, texts
from tests.conftest import Eventually
from tests.scale.balancer import LoadBalancer

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_stream_is_resumed_on_another_gateway(
    cluster: Cluster, balancer: LoadBalancer, eventually: Eventually
) -> None:
    """The gateway that told a stream is killed: behind the balancer the other one tells the rest, from the last event on."""
    await cluster.start_worker("echo")
    body = chat("one two three four", stream=True, echo={"delay_ms": 50, "tokens": 60})
    told = cluster.record(body, url=balancer.url, **{"x-nexus-resume": "true"})
    await eventually(lambda: len(told.texts) > 5)
    assert told.headers is not None
    job = told.headers["x-nexus-job-id"]
    gateway = await teller(cluster)
    cluster.gateways[gateway].kill()
    await told.end()
    assert not told.complete
    last = [line for line in told.body.splitlines() if line.startswith("id: ")][-1][4:]
    whole = "".join(told.texts)
    follow = cluster.http.stream("GET", f"{balancer.url}/v1/jobs/{job}/events", headers={"last-event-id": last})
    async with follow as events:
        assert events.status_code == 200
        async for line in events.aiter_lines():
            if line.startswith("data: ") and '"choices"' in line:
                whole += "".join(texts([line[6:]]))
            elif line == "event: job.completed":
                break
    assert whole.split() == ["one", "two", "three", "four"] * 15
    await cluster.gateways[gateway].start()


async def teller(cluster: Cluster) -> int:
    """Which gateway has a request open."""
    for number, url in enumerate(cluster.urls):
        metrics = (await cluster.http.get(url + "/metrics")).text
        if "nexus_requests_in_flight 1.0" in metrics:
            return number
    raise AssertionError("no gateway has a request open")


async def test_a_hang_up_passes_the_balancer(cluster: Cluster, balancer: LoadBalancer, eventually: Eventually) -> None:
    """A caller who hangs up on the balancer has hung up on the gateway: the backend is told to stop."""
    worker = next(iter(cluster.workers))
    attempts = len(cluster.attempts(worker))
    stream = cluster.record(chat(stream=True, echo={"delay_ms": 50, "tokens": 100_000}), url=balancer.url)
    await eventually(lambda: stream.texts)
    await stream.hang_up()
    await eventually(lambda: len(cluster.attempts(worker)) > attempts)
    assert cluster.attempts(worker)[-1]["outcome"] == "cancelled"


async def test_no_gateway(cluster: Cluster, balancer: LoadBalancer) -> None:
    """Without any gateway the balancer itself answers, with an error that OpenAI's clients understand."""
    for gateway in cluster.gateways:
        gateway.kill()
    await asyncio.gather(*(gateway.wait() for gateway in cluster.gateways))
    response = await cluster.http.post(balancer.url + "/v1/chat/completions", json=chat())
    assert response.status_code in {502, 503}
    assert json.loads(response.text)["error"]["code"] == "unavailable"
    assert response.headers["retry-after"]
