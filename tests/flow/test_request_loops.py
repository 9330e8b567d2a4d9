"""Workers that are pointed at a Nexus: their own, through a proxy, through an alias; and one Nexus behind another, which may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from tests.cluster import KEY, Cluster, chat
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

SENTENCE = "is a Nexus gateway, and this worker belongs to a Nexus: its jobs would go round in circles"


class Proxy:
    """A load balancer in a few lines: it passes bytes on, and counts connections."""

    def __init__(self) -> None:
        self.target = ""
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, target: str) -> str:
        self.target = target
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        parts = urlsplit(self.target)
        back, forth = await asyncio.open_connection(parts.hostname, parts.port)
        for source, sink in ((reader, forth), (back, writer)):
            task = asyncio.create_task(self._pass(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()


@pytest_asyncio.fixture(loop_scope="module")
async def proxy() -> AsyncIterator[Proxy]:
    proxy = Proxy()
    yield proxy
    await proxy.stop()


@pytest.mark.parametrize("backend", ["openai", "ollama", "piper", "comfyui"])
async def test_a_worker_on_its_own_gateway_is_refused(
    backend: str, cluster: Cluster, proxy: Proxy, eventually: Eventually
) -> None:
    """Through a proxy, with a key that may do everything, whatever adapter: never ready, with the reason in the registry."""
    await cluster.start_worker(name=f"real-{backend}")
    url = await proxy.start(cluster.url)
    name = await cluster.start_worker(
        backend, name=f"loop-{backend}", wait=False, WORKER_BACKEND_URL=url, WORKER_BACKEND_KEY=KEY
    )
    await cluster.wait_for_worker(name, "unhealthy")
    workers = (await cluster.get("/v1/workers")).json()["data"]
    [row] = [one for one in workers if one["id"] == name]
    assert SENTENCE in " ".join(row["problems"])
    assert proxy.connections
    assert (await cluster.post("/v1/chat/completions", chat())).status_code == 200
    await cluster.stop_workers(name, f"real-{backend}")


async def test_a_request_of_a_worker_is_refused_at_every_path(cluster: Cluster) -> None:
    """Before the key is looked at: the first question of an adapter must find out."""
    for path in ("/v1/models", "/health", "/readyz", "/api/tags", "/nothing"):
        answer = await cluster.get(path, headers={"x-nexus-hops": "1", "authorization": ""})
        assert answer.status_code == 508, path
        assert answer.headers["x-nexus-hops"] == "refused"
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("request_loop", "invalid_request_error")
    for value in ("0", "nonsense", "-1", "99999999999999999999"):
        unknown = chat(model="unknown")  # a known model's request would wait for a worker
        answer = await cluster.post("/v1/chat/completions", unknown, headers={"x-nexus-hops": value})
        assert (answer.json()["error"]["code"] == "request_loop") is (value != "0"), answer.text


async def test_a_nexus_behind_another_one_and_a_circle_of_two(tmp_path: Path, eventually: Eventually) -> None:
    """Where its operator allows it; a circle is cut where the limit is reached, and multiplies nothing."""
    async with Cluster(tmp_path / "a") as first, Cluster(tmp_path / "b") as second:
        await asyncio.gather(first.start_gateway(GATEWAY_MAX_HOPS="1"), second.start_gateway(GATEWAY_MAX_HOPS="1"))
        await second.start_worker(WORKER_MODELS="deep")
        keys: dict[str, Any] = {"WORKER_BACKEND_KEY": KEY, "WORKER_HEALTH_INTERVAL_S": "0.5"}
        await first.start_worker("openai", WORKER_BACKEND_URL=second.url, WORKER_MODELS="deep", **keys)
        answer = await first.post("/v1/chat/completions", chat("through two", model="deep"))
        assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "through two")

        # Both now say that the other has `round`: each serves what the other serves.
        await second.start_worker(WORKER_MODELS="round", name="seed")
        await first.start_worker("openai", name="to-b", WORKER_BACKEND_URL=second.url, WORKER_MODELS="round", **keys)
        await second.start_worker("openai", name="to-a", WORKER_BACKEND_URL=first.url, WORKER_MODELS="round", **keys)
        await second.stop_workers("seed")
        answer = await first.post("/v1/chat/completions", chat(model="round"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (508, "request_loop"), answer.text
        assert "circles" in answer.text
        await eventually(lambda: len(first.attempts("to-b")) == len(second.attempts("to-a")) == 1)
