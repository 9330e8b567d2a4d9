"""A whole Nexus of real processes on free ports, for tests that look at it from outside.

    async with Cluster(tmp_path) as cluster:
        await cluster.start_gateway()
        worker = await cluster.start_worker("echo")
        answer = await cluster.post("/v1/chat/completions", {"model": "echo", ...})
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from cli.embedded.process import ManagedProcess
from cli.embedded.servers import EtcdServer, NatsServer, RedisServer

KEY = "sk-test-key"
ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def chat(content: str = "hello there", *, model: str = "echo", **fields: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


def data_lines(body: str) -> list[str]:
    """What follows `data: ` in an SSE body."""
    return [line[6:] for line in body.split("\n") if line.startswith("data: ")]


class Cluster:
    """NATS, etcd and Redis of its own, and any number of gateways and workers."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.settings = settings
        """Environment variables for every gateway and worker."""
        self.nats = NatsServer(folder / "nats")
        self.etcd = EtcdServer(folder / "etcd")
        self.redis = RedisServer(folder / "redis")
        self.gateways: list[ManagedProcess] = []
        self.workers: dict[str, ManagedProcess] = {}
        self.urls: list[str] = []
        self.observability_url = ""
        self.http = httpx.AsyncClient(timeout=60, headers={"authorization": f"Bearer {KEY}"})

    async def __aenter__(self) -> Cluster:
        await asyncio.gather(self.nats.start(), self.etcd.start(), self.redis.start())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        for process in [*self.workers.values(), *self.gateways]:
            process.resume()
        await asyncio.gather(*(p.stop() for p in [*self.workers.values(), *self.gateways]))
        for server in (self.nats, self.etcd, self.redis):
            server.resume()
        await asyncio.gather(self.nats.stop(), self.etcd.stop(), self.redis.stop())

    def environment(self, **settings: str) -> dict[str, str]:
        """What a gateway or worker of this cluster is configured by."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("WORKER_", "GATEWAY_"))}
        return plain | {
            "NATS_URL": self.nats.url,
            "ETCD_URL": self.etcd.url,
            "REDIS_URL": self.redis.url,
            "GATEWAY_BEARER_TOKEN": KEY,
            "PYTHONPATH": str(ROOT),
            **self.settings,
            **settings,
        }

    @property
    def url(self) -> str:
        """The first gateway's."""
        return self.urls[0]

    async def start_gateway(self, **settings: str) -> ManagedProcess:
        """One more gateway, ready."""
        port, side = free_port(), free_port()
        settings = {"GATEWAY_PORT": str(port), "OBSERVABILITY_PORT": str(side)} | settings
        url = f"http://127.0.0.1:{port}"

        async def ready() -> bool:
            try:
                return (await self.http.get(url + "/readyz")).status_code == 200
            except httpx.HTTPError:
                return False

        process = ManagedProcess(
            f"gateway-{len(self.gateways)}",
            [sys.executable, "-m", "gateway"],
            log_file=self.folder / f"gateway-{len(self.gateways)}.log",
            env=self.environment(**settings),
            ready=ready,
        )
        await process.start()
        self.gateways.append(process)
        self.urls.append(url)
        self.observability_url = self.observability_url or f"http://127.0.0.1:{side}"
        return process

    async def start_worker(self, backend: str = "echo", *, name: str | None = None, wait: bool = True, **settings: str) -> str:
        """One more worker; with `wait`, seen `ready` by the first gateway. Returns its id."""
        name = name or f"w{len(self.workers) + 1}"
        process = ManagedProcess(
            name,
            [sys.executable, "-m", "workers"],
            log_file=self.folder / f"worker-{name}.log",
            env=self.environment(WORKER_BACKEND=backend, WORKER_NAME=name, **settings),
        )
        await process.start()
        self.workers[name] = process
        if wait:
            await self.wait_for_worker(name)
        return name

    async def wait_for_worker(self, name: str, state: str | None = "ready", timeout_s: float = 30.0) -> None:
        """Until the first gateway sees the worker in this state (None: not at all)."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            seen = (await self.http.get(self.url + "/v1/workers")).json()["data"]
            if {worker["id"]: worker["state"] for worker in seen}.get(name) == state:
                return
            assert asyncio.get_running_loop().time() < deadline, f"worker {name} not {state}: {seen}\n{self.logs()}"
            await asyncio.sleep(0.05)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        """GET from the first gateway."""
        return await self.http.get(self.url + path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST JSON to the first gateway."""
        return await self.http.post(self.url + path, json=body, **options)

    async def stream(self, body: dict[str, Any], *, path: str = "/v1/chat/completions", url: str = "") -> AsyncIterator[str]:
        """The `data:` payloads of a streamed answer, as they come, `[DONE]` included."""
        request = self.http.stream("POST", (url or self.url) + path, json=body | {"stream": True})
        async with request as response:
            assert response.status_code == 200, (await response.aread()).decode()
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    yield line[6:]

    def logs(self) -> str:
        """The last lines of every process, for a failing test's message."""
        return "\n".join(f"--- {p.name}\n{p.tail(15)}" for p in [*self.gateways, *self.workers.values()])

    def log_events(self, process: ManagedProcess) -> list[dict[str, Any]]:
        """A process's JSON log lines."""
        lines = Path(process.log_file).read_text().splitlines() if process.log_file else []
        return [json.loads(line) for line in lines if line.startswith("{")]
