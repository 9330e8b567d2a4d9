"""Callers who do not read their answers: they end in time, and all together cost a bounded amount of memory."""

from __future__ import annotations

import asyncio
import json
import select
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from tests.cluster import KEY, Cluster, Crew, chat
from tests.conftest import Eventually
from tests.faults.conftest import SETTINGS

pytestmark = pytest.mark.asyncio(loop_scope="module")

WRITE_TIMEOUT_S = 2.0
SLACK_S = 15.0
MIB = 1024 * 1024
MAX_UNREAD = 8 * MIB
KERNEL = 256 * 1024
"""Bytes that the kernel takes of an answer before it holds its writer up, with some to spare."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """A cluster whose gateway is soon tired of callers who do not read."""
    async with Cluster(
        tmp_path_factory.mktemp("readers"), **SETTINGS, WRITE_TIMEOUT_S=f"{WRITE_TIMEOUT_S:g}"
    ) as cluster:
        await cluster.start_gateway()
        yield cluster


@contextmanager
def unread(
    cluster: Cluster, method: str, path: str, body: Any = None, *, key: str = KEY, url: str = ""
) -> Iterator[socket.socket]:
    """A request whose caller reads nothing of the answer, with the smallest of buffers."""
    data = b"" if body is None else json.dumps(body).encode()
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", urlsplit(url or cluster.url).port or 0))
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
        )
        client.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        yield client


def is_closed(client: socket.socket) -> bool:
    """Whether the server has closed the connection, seen without reading."""
    poll = select.poll()
    poll.register(client, select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))


async def has_output(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, select.POLLIN)
    return bool(poll.poll(0))


async def ends_in_time(client: socket.socket, eventually: Eventually) -> None:
    """Not at once, and not much later than promised."""
    await eventually(lambda: has_output(client))
    began = asyncio.get_running_loop().time()
    assert not is_closed(client)
    await eventually(lambda: is_closed(client), timeout_s=WRITE_TIMEOUT_S + SLACK_S)
    assert asyncio.get_running_loop().time() - began > WRITE_TIMEOUT_S / 2


async def test_a_stream_that_goes_on(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """Nobody reads a stream that is being made: its connection ends, and the worker is told to stop."""
    worker = await crew.start()
    script = {"tokens": 6000, "size": 4 * MIB, "delay_ms": 10}
    with unread(cluster, "POST", "/v1/chat/completions", chat(model=crew.model, stream=True, echo=script)) as client:
        await ends_in_time(client, eventually)
    await eventually(lambda: cluster.attempts(worker))
    assert cluster.attempts(worker)[0]["outcome"] == "cancelled"
    await eventually(crew.idle)


@pytest.mark.parametrize("size", [480 * 1024, 3 * MIB], ids=["here", "by reference"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_an_answer_that_is_done(
    crew: Crew, cluster: Cluster, eventually: Eventually, *, size: int, stream: bool
) -> None:
    """Nobody reads an answer that is complete, streamed or not, large or not: it is not held for longer than promised."""
    await crew.start()
    body = chat(model=crew.model, stream=stream, echo={"tokens": 64, "size": size})
    with unread(cluster, "POST", "/v1/chat/completions", body) as client:
        await ends_in_time(client, eventually)
    await eventually(lambda: nothing_open(cluster))


async def test_a_file(cluster: Cluster, eventually: Eventually) -> None:
    """So it is with a file."""
    upload = {"file": ("a.bin", b"x" * 2 * MIB)}
    made = await cluster.http.post(cluster.url + "/v1/files", files=upload, data={"purpose": "user_data"})
    with unread(cluster, "GET", f"/v1/files/{made.json()['id']}/content") as client:
        await ends_in_time(client, eventually)


async def test_a_job(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """And with a job's events, and its result; the job itself is none the worse."""
    await crew.start()
    body = chat(model=crew.model, stream=True, echo={"tokens": 500, "size": 2 * MIB})
    made = (await cluster.post("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": body})).json()
    with unread(cluster, "GET", made["events_url"]) as client:
        await ends_in_time(client, eventually)
    await eventually(lambda: completed(cluster, made["id"]))
    with unread(cluster, "GET", made["result_url"]) as client:
        await ends_in_time(client, eventually)
    assert (await cluster.get(made["result_url"])).text.endswith("data: [DONE]\n\n")


async def test_a_response(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """And with a response's events."""
    await crew.start()
    body = {"model": crew.model, "input": "hello", "stream": True, "echo": {"tokens": 500, "size": 2 * MIB}}
    with unread(cluster, "POST", "/v1/responses", body) as client:
        await ends_in_time(client, eventually)


async def completed(cluster: Cluster, job: str) -> bool:
    return bool((await cluster.get(f"/v1/jobs/{job}")).json()["status"] == "completed")


async def nothing_open(cluster: Cluster) -> bool:
    metrics = (await cluster.http.get(cluster.observability_url + "/metrics")).text
    return "nexus_requests_in_flight 0.0" in metrics


async def test_a_slow_reader(crew: Crew, cluster: Cluster) -> None:
    """A caller who reads slowly, but reads, gets all of its answer, however long it takes."""
    await crew.start()
    loop = asyncio.get_running_loop()
    with unread(
        cluster,
        "POST",
        "/v1/chat/completions",
        chat(model=crew.model, stream=True, echo={"tokens": 64, "size": 4 * KERNEL}),
    ) as client:
        client.setblocking(False)
        answer, began = b"", loop.time()
        while loop.time() - began < 3 * WRITE_TIMEOUT_S:
            answer += await loop.sock_recv(client, 8192)
            await asyncio.sleep(WRITE_TIMEOUT_S / 10)
        assert len(answer) < 2 * KERNEL  # the rest is still to come
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            piece = await asyncio.wait_for(loop.sock_recv(client, MIB), SLACK_S)
            assert piece, "the connection ended before the answer"
            answer += piece
    assert b"data: [DONE]" in answer[-200:]


async def test_all_together(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """Many unread streams of one key take no more memory than all may; a slow reader with another key gets all of its own."""
    await crew.start(WORKER_CONCURRENCY="64")
    key = (await cluster.post("/v1/keys", {"name": "hoarder"})).json()["key"]
    honest = chat(model=crew.model, stream=True, echo={"tokens": 64, "size": 4 * MIB})
    hoard = chat(model=crew.model, stream=True, echo={"tokens": 64, "size": 2 * MIB})
    await cluster.start_gateway(WRITE_TIMEOUT_S="10", MAX_UNREAD_BYTES=str(MAX_UNREAD))
    url = cluster.urls[1]
    await eventually(lambda: serves(crew, url))
    before = peak = resident(cluster, 1)
    with unread(cluster, "POST", "/v1/chat/completions", honest, url=url) as slow, ExitStack() as stack:
        slow.setblocking(False)
        for _ in range(40):
            stack.enter_context(unread(cluster, "POST", "/v1/chat/completions", hoard, key=key, url=url))
        received = b""

        async def all_ended() -> bool:
            nonlocal received, peak
            received += await asyncio.wait_for(asyncio.get_running_loop().sock_recv(slow, 4096), SLACK_S)
            peak = max(peak, resident(cluster, 1))
            return len(cluster.requests(1)) >= 40

        await eventually(all_ended, timeout_s=60)
        assert not received.endswith(b"\r\n0\r\n\r\n")
        while not received.endswith(b"\r\n0\r\n\r\n"):
            piece = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(slow, MIB), SLACK_S)
            assert piece, "the honest caller was cut off"
            received += piece
    assert b"data: [DONE]" in received[-200:]
    assert [request.get("error") for request in cluster.requests(1)].count("slow_reader") > 20
    assert peak - before < 4 * MAX_UNREAD


async def serves(crew: Crew, url: str) -> bool:
    """Whether the gateway there knows the crew's model."""
    models = (await crew.cluster.http.get(url + "/v1/models")).json()["data"]
    return any(entry["id"] == crew.model for entry in models)


def resident(cluster: Cluster, gateway: int) -> int:
    """Bytes of memory that a gateway holds."""
    return int(Path(f"/proc/{cluster.gateways[gateway].pid}/statm").read_text().split()[1]) * 4096
