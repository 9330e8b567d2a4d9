"""NATS, etcd, Redis, gateways and workers in containers: `pytest --servers containers`."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import httpx

from tests.containers.engine import Engine, image_of, own_image
from tests.containers.process import ContainerProcess
from tests.ports import free_port
from tests.servers import ROOT, Process, Server, log_file

HARDENED: dict[str, Any] = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
    "tmpfs": {"/tmp": "mode=1777,size=64m,noexec,nosuid,nodev"},
}
"""As in docker-compose.yml."""
PUBLISHED = ("GATEWAY_PORT", "OBSERVABILITY_PORT", "WORKER_OBSERVABILITY_PORT")
NATS_CONFIG = "/etc/nats/compose.conf"


class ContainerServer:
    """A server in a container. Data lies in the container: `restart` and a `start` after `stop` keep it."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        folder: Path,
        scheme: str,
        inner_port: int,
        command: list[str],
        *,
        answers: Callable[[int], Awaitable[bool]],
        env: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        alias: str = "",
        path: str = "",
        forgetful: bool = False,
    ) -> None:
        """`forgetful`: `start` begins with nothing, as the embedded one of its kind does."""
        self.port = free_port()
        alias = alias or f"{name}-{uuid.uuid4().hex[:8]}"
        self.url = f"{scheme}://127.0.0.1:{self.port}{path}"
        self.inner_url = f"{scheme}://{alias}:{inner_port}{path}"
        """From where gateways and workers run."""
        self.log_file = folder / f"{name}.log"
        self._forgetful = forgetful
        self.process = ContainerProcess(
            engine,
            name,
            image_of(name),
            log_file=self.log_file,
            alias=alias,
            ports={inner_port: self.port},
            command=command,
            env=env,
            files=files,
            ready=lambda: answers(self.port),
        )

    @property
    def running(self) -> bool:
        return self.process.running

    @property
    def pid(self) -> int | None:
        return self.process.pid

    async def start(self) -> None:
        if self._forgetful and not self.running:
            self.wipe()
        await self.process.start()

    async def stop(self, grace_s: float = 2.0) -> None:
        await self.process.stop(grace_s)

    async def restart(self) -> None:
        await self.process.stop()
        await self.process.start()

    def kill(self) -> None:
        self.process.kill()

    def pause(self) -> None:
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def wipe(self) -> None:
        self.process.remove()


class ContainerSource:
    """Containers in one network of their own."""

    processes = False
    borrowed = False

    def __init__(self) -> None:
        """Raises Unusable where no engine answers."""
        self.engine = Engine()
        self.engine.sweep()

    @property
    def here(self) -> str:
        return self.engine.gateway_ip

    def nats(self, folder: Path) -> Server:
        return self._nats(folder)

    def nats_cluster(self, folder: Path, size: int) -> list[Server]:
        names = [f"nats-{n}-{uuid.uuid4().hex[:8]}" for n in range(size)]
        routes = ", ".join(f'"nats://{name}:6222"' for name in names)
        cluster = f'cluster {{ name: three, listen: "0.0.0.0:6222", no_advertise: true, routes: [{routes}] }}\n'
        return [self._nats(folder / f"nats-{n}", name, cluster) for n, name in enumerate(names)]

    def _nats(self, folder: Path, name: str = "", more: str = "") -> Server:
        config = (ROOT / "deploy/nats/compose.conf").read_text()
        if name:
            config = config.replace("server_name: nats", f"server_name: {name}")
        return ContainerServer(
            self.engine,
            "nats",
            folder,
            "nats",
            4222,
            ["nats-server", "--config", NATS_CONFIG],
            answers=_nats_answers,
            env={"NATS_MAX_STORE": "24GB", "NATS_SYNC_INTERVAL": "2m"},
            files={NATS_CONFIG: config + more},
            alias=name,
        )

    def etcd(self, folder: Path) -> Server:
        return ContainerServer(
            self.engine,
            "etcd",
            folder,
            "http",
            2379,
            [
                "/usr/local/bin/etcd",
                "--data-dir=/tmp/etcd",
                "--listen-client-urls=http://0.0.0.0:2379",
                "--advertise-client-urls=http://127.0.0.1:2379",
                "--max-txn-ops=0",
                "--log-level=error",
            ],
            answers=_etcd_answers,
            # A disk that others write to must not cost it its leadership over itself.
            env={"ETCD_UNSAFE_NO_FSYNC": "true", "ETCD_HEARTBEAT_INTERVAL": "50", "ETCD_ELECTION_TIMEOUT": "250"},
            forgetful=True,
        )

    def redis(self, folder: Path) -> Server:
        return ContainerServer(
            self.engine,
            "redis",
            folder,
            "redis",
            6379,
            ["redis-server", "--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction"],
            answers=_redis_answers,
            path="/0",
        )

    def part(
        self,
        kind: str,
        name: str,
        folder: Path,
        servers: Mapping[str, Server],
        settings: Mapping[str, str],
        ready: Callable[[], Awaitable[bool]] | None = None,
    ) -> Process:
        urls = {setting: cast("ContainerServer", server).inner_url for setting, server in servers.items()}
        ports = {int(settings[port]) for port in PUBLISHED if settings.get(port, "0") != "0"}
        return ContainerProcess(
            self.engine,
            name,
            own_image(kind),
            log_file=log_file(kind, name, folder),
            alias=f"{name}-{uuid.uuid4().hex[:8]}",
            ports={port: port for port in ports},
            env=urls | dict(settings),
            ready=ready,
            **HARDENED,
        )

    async def release(self, *parts: Server | Process) -> None:
        await asyncio.gather(
            *(asyncio.to_thread(cast("ContainerProcess", getattr(part, "process", part)).remove) for part in parts)
        )

    def close(self) -> None:
        # xdist's first process outlives its workers, also those that were killed.
        self.engine.clean(whole_run="PYTEST_XDIST_WORKER" not in os.environ)


async def _asked(port: int, question: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(question)
        await writer.drain()
        return await reader.readline()
    finally:
        writer.close()


async def _nats_answers(port: int) -> bool:
    return b'"jetstream":true' in await _asked(port, b"")


async def _redis_answers(port: int) -> bool:
    return await _asked(port, b"PING\r\n") == b"+PONG\r\n"


async def _etcd_answers(port: int) -> bool:
    try:
        async with httpx.AsyncClient() as http:
            answer = await http.get(f"http://127.0.0.1:{port}/health")
    except httpx.HTTPError:
        return False
    return answer.json().get("health") == "true"
