"""Callers that go away, read slowly, or lose their gateway."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from backbone.bus.bus import MAX_FRESH_AGE_S
from tests.backends.doubles.openai import OpenAIDouble
from tests.cluster import KEY, Cluster, Crew, chat
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

STOP_S = 2.0
SLACK_S = 15.0
MIB = 1024 * 1024


@pytest_asyncio.fixture(loop_scope="module")
async def double() -> AsyncIterator[OpenAIDouble]:
    async with OpenAIDouble() as server:
        yield server


async def on_double(crew: Crew, double: OpenAIDouble, slots: int = 1) -> str:
    """A worker on the double, which serves the crew's model."""
    behave(double, crew)
    return await crew.start(backend="openai", WORKER_BACKEND_URL=double.url, WORKER_CONCURRENCY=str(slots))


def behave(double: OpenAIDouble, crew: Crew, **changes: Any) -> None:
    """How the double answers from now on."""
    double.behave(models=({"id": crew.model, "object": "model", "created": 7, "owned_by": "tests"},), **changes)


def prompts(double: OpenAIDouble) -> list[str]:
    """What has reached the backend."""
    return [seen.json["messages"][0]["content"] for seen in double.seen if seen.method == "POST"]


async def test_gone_while_queued(crew: Crew, double: OpenAIDouble, eventually: Eventually) -> None:
    """A caller who hangs up while queued is never run, streaming or not; those behind are."""
    await on_double(crew, double)
    behave(double, crew, first_delay_s=60.0)
    running = crew.stream("one")
    await eventually(lambda: double.streaming == 1)
    gone = [crew.ask("never"), crew.stream("never")]
    behind = crew.ask("two")
    await eventually(lambda: crew.waits(3))
    for caller in gone:
        await caller.hang_up()
    await eventually(lambda: crew.waits(1), what="they have left the queue")
    behave(double, crew)
    await running.hang_up()
    await behind.end()
    assert behind.status == 200
    assert prompts(double) == ["one", "two"]
    await eventually(lambda: crew.idle())


async def stopped(crew: Crew, cluster: Cluster, double: OpenAIDouble, worker: str, eventually: Eventually) -> None:
    """Until the backend was stopped; then the next caller is served in the same slot."""
    await asyncio.wait_for(double.disconnected.wait(), STOP_S + SLACK_S)
    behave(double, crew)
    assert (await crew.ask().end()).status == 200
    await eventually(lambda: len(cluster.attempts(worker)) == 2)
    assert [attempt["outcome"] for attempt in cluster.attempts(worker)] == ["cancelled", "completed"]
    await eventually(lambda: crew.idle())


@pytest.mark.parametrize("streamed", [True, False])
async def test_gone_while_running(
    crew: Crew, cluster: Cluster, double: OpenAIDouble, eventually: Eventually, *, streamed: bool
) -> None:
    """A caller hangs up while the answer is made: the backend is stopped within two seconds, and the slot is free again."""
    worker = await on_double(crew, double)
    behave(double, crew, token_delay_s=0.1, words=("word",) * 600)
    caller = crew.ask(stream=streamed)
    await eventually(lambda: double.streaming == 1)
    await caller.hang_up()
    await stopped(crew, cluster, double, worker, eventually)


async def test_gone_from_a_request_in_one_write(
    crew: Crew, cluster: Cluster, double: OpenAIDouble, eventually: Eventually
) -> None:
    """The same where the gateway serves the request without a task; one that is still queued is never run."""
    worker = await on_double(crew, double)
    behave(double, crew, token_delay_s=0.1, words=("word",) * 600)
    _, running = await cluster.send(chat("one", model=crew.model))
    await eventually(lambda: double.streaming == 1)
    _, queued = await cluster.send(chat("never", model=crew.model))
    await eventually(lambda: crew.waits(1))
    queued.close()
    await eventually(lambda: crew.waits(0))
    running.close()
    await stopped(crew, cluster, double, worker, eventually)
    assert "never" not in prompts(double)


@pytest.mark.parametrize("streamed", [True, False])
async def test_gone_before_the_first_output(
    crew: Crew, cluster: Cluster, double: OpenAIDouble, eventually: Eventually, *, streamed: bool
) -> None:
    """A caller hangs up as soon as the backend has the request, before the gateway knows which worker has it: the backend is stopped."""
    worker = await on_double(crew, double)
    behave(double, crew, first_delay_s=60.0)
    caller = crew.ask("quick", stream=streamed)
    while "quick" not in prompts(double):
        await asyncio.sleep(0.001)
    await caller.hang_up()
    await stopped(crew, cluster, double, worker, eventually)


async def test_gateway_killed_while_its_jobs_wait_and_run(
    crew: Crew, cluster: Cluster, double: OpenAIDouble, eventually: Eventually
) -> None:
    """A gateway is killed: what it had running is stopped; what it had queued leaves the queue, and never reaches the backend."""
    second = await cluster.start_gateway()
    worker = await on_double(crew, double)
    url = cluster.urls[-1]
    await eventually(lambda: serves(cluster, url, crew.model))
    behave(double, crew, token_delay_s=0.1, words=("word",) * 600)
    orphans = [crew.stream(f"orphan {number}", url=url) for number in range(12)]
    await eventually(lambda: crew.waits(11))
    await eventually(lambda: double.streaming == 1)
    second.kill()
    for orphan in orphans:
        assert (await orphan.end()).broken
    await eventually(lambda: crew.idle(), what="the orphans have left the queue")
    behave(double, crew)
    assert (await crew.ask("served").end()).status == 200
    assert len(asked := prompts(double)) == 2, asked
    assert asked[1] == "served"
    await eventually(lambda: len(cluster.attempts(worker)) == 13)
    assert [attempt["outcome"] for attempt in cluster.attempts(worker)] == ["cancelled"] * 12 + ["completed"]


async def test_gateway_killed_while_short_jobs_wait(
    crew: Crew, cluster: Cluster, double: OpenAIDouble, eventually: Eventually
) -> None:
    """No queued request of a killed gateway reaches the backend, however quickly the one before it ended."""
    second = await cluster.start_gateway()
    await on_double(crew, double)
    url = cluster.urls[-1]
    await eventually(lambda: serves(cluster, url, crew.model))
    before = len(prompts(double))
    hold = asyncio.Event()
    behave(double, crew, hold=hold)
    orphans = [crew.ask(f"orphan {number}", url=url) for number in range(12)]
    await eventually(lambda: crew.waits(11))
    await eventually(lambda: len(prompts(double)) == before + 1)
    await asyncio.sleep(4 * MAX_FRESH_AGE_S)  # they have waited: there is nothing to await
    second.kill()
    for orphan in orphans:
        assert (await orphan.end()).broken
    hold.set()
    behave(double, crew)
    await eventually(lambda: crew.idle(), what="the orphans have left the queue")
    assert (await crew.ask("served").end()).status == 200
    assert prompts(double)[before + 1 :] == ["served"]


async def serves(cluster: Cluster, url: str, model: str) -> bool:
    models = (await cluster.http.get(url + "/v1/models")).json()["data"]
    return any(entry["id"] == model for entry in models)


async def test_slow_reader(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """A caller who reads too slowly costs the gateway a bounded amount of memory, and the worker its slot only until then."""
    worker = await crew.start()
    before = resident(cluster)
    body = json.dumps(chat(model=crew.model, stream=True, echo={"tokens": 4000, "size": 60 * MIB, "delay_ms": 1}))
    with socket.create_connection(("127.0.0.1", urlsplit(cluster.url).port or 0)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        client.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        await eventually(lambda: cluster.attempts(worker), timeout_s=30)
        # A heartbeat may be answered before the order to cancel is there.
        assert cluster.attempts(worker)[0]["outcome"] in {"cancelled", "fenced"}
        assert resident(cluster) - before < 40 * MIB
        client.setblocking(False)
        answer = await asyncio.wait_for(read_all(client), 30)
    assert b"[DONE]" not in answer[-500:]
    assert b'"slow_reader"' in answer[-500:]
    assert (await crew.ask().end()).status == 200


async def read_all(client: socket.socket) -> bytes:
    """Until the answer's last chunk."""
    answer = b""
    while not answer.endswith(b"\r\n0\r\n\r\n"):
        data = await asyncio.get_running_loop().sock_recv(client, MIB)
        if not data:
            break
        answer = (answer + data)[-4096:]
    return answer


def resident(cluster: Cluster) -> int:
    """Bytes of memory that the first gateway holds."""
    return int(Path(f"/proc/{cluster.gateways[0].pid}/statm").read_text().split()[1]) * 4096
