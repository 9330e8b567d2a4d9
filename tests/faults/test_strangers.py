"""Callers without a key: what they send costs the gateway no more than they have sent, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio

from tests.cluster import Cluster, Crew
from tests.conftest import Eventually
from tests.faults.conftest import SETTINGS

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1024 * 1024
MOST = 30
GROWTH = 24 * MIB
"""Memory that a gateway may take on the way, for whatever reason."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """A cluster; the second gateway bounds connections tightly."""
    async with Cluster(tmp_path_factory.mktemp("strangers"), **SETTINGS, MAX_WRONG_KEYS="20") as cluster:
        await cluster.start_gateway()
        await cluster.start_gateway(MAX_CONNECTIONS_PER_ADDRESS=str(MOST))
        yield cluster


async def connect(cluster: Cluster, gateway: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", urlsplit(cluster.urls[gateway]).port)


def resident(cluster: Cluster) -> int:
    """Bytes of memory that the first gateway holds."""
    return int(Path(f"/proc/{cluster.gateways[0].pid}/statm").read_text().split()[1]) * 4096


async def test_pipelined_requests(crew: Crew, cluster: Cluster) -> None:
    """Connections that pipeline without end take their turns: everybody else is answered meanwhile, and memory is bounded."""
    await crew.start()
    before = resident(cluster)
    ended = asyncio.Event()

    async def attack() -> None:
        while not ended.is_set():
            _, writer = await connect(cluster)
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 14_000)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), 1.5)
            writer.transport.abort()

    attackers = [asyncio.create_task(attack()) for _ in range(2)]
    for _ in range(50):
        assert (await crew.ask().end()).status == 200
    assert not any(attacker.done() for attacker in attackers)
    growth = resident(cluster) - before
    ended.set()
    await asyncio.gather(*attackers)
    assert growth < GROWTH


async def test_trailers(cluster: Cluster) -> None:
    """A chunked body's trailers do not fill the memory: the connection is closed."""
    before = resident(cluster)
    reader, writer = await connect(cluster)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    with contextlib.suppress(ConnectionError):
        for _ in range(20 * MIB // 60_000):
            writer.write(b"a:b\r\n" * 12_000)
            await writer.drain()
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), 10)
    assert resident(cluster) - before < GROWTH
    writer.transport.abort()


async def test_a_key_in_a_trailer(cluster: Cluster) -> None:
    """A trailer authorizes nobody."""
    body = b'{"model": "none", "messages": []}'
    reader, writer = await connect(cluster)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        + b"%x\r\n%b\r\n0\r\n" % (len(body), body)
        + f"authorization: {cluster.http.headers['authorization']}\r\n\r\n".encode()
    )
    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 401 ")
    writer.transport.abort()


async def test_too_many_connections(cluster: Cluster, eventually: Eventually) -> None:
    """One address has so many connections; the next is 503 with `Retry-After`, until some have ended."""
    held = [await connect(cluster, 1) for _ in range(MOST)]
    reader, writer = await connect(cluster, 1)
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    head, _, body = answer.lower().partition("\r\n\r\n")
    assert head.startswith("http/1.1 503 ")
    assert "retry-after: " in head
    assert json.loads(body)["error"]["code"] == "too_many_connections"
    for _, held_writer in [*held, (reader, writer)]:
        held_writer.close()

    async def answers() -> bool:
        async with httpx.AsyncClient() as client:
            try:
                return (await client.get(cluster.urls[1] + "/health")).status_code == 200
            except httpx.HTTPError:
                return False

    await eventually(answers)


async def test_guessed_keys(cluster: Cluster) -> None:
    """Who tries out keys gets 429 after some; anyone who has one goes on at the same address."""
    made = (await cluster.post("/v1/keys", {"name": "honest", "scopes": ["inference"]})).json()["key"]
    answers = []
    async with httpx.AsyncClient(base_url=cluster.url) as client:
        for _ in range(40):
            key = f"Bearer nexus-{uuid.uuid4().hex}AAAAAAAAAAA"
            answers.append(await client.get("/v1/models", headers={"authorization": key}))
        assert [answer.status_code for answer in answers] == [401] * 20 + [429] * 20
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert answers[-1].json()["error"]["code"] == "too_many_wrong_keys"
        assert (await client.get("/v1/models", headers={"authorization": f"Bearer {made}"})).status_code == 200
    assert (await cluster.get("/v1/models")).status_code == 200
