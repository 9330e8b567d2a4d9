"""Where a test's servers, gateways and workers come from: one option, `pytest --servers`, three sources.

| source | NATS, etcd, Redis | gateways and workers |
|---|---|---|
| `embedded` | processes, from wheels | processes |
| `containers` | containers of the images in docker-compose.yml | containers of this tree's own images |
| `external` | at NEXUS_TEST_NATS_URL, NEXUS_TEST_ETCD_URL, NEXUS_TEST_REDIS_URL: empty ones, that tests may fill and empty | processes |

Tests say what they do to them through `Server` and `Process`, whatever they are. A test that kills or freezes an external
server is skipped there at that step.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from cli.embedded.managed_process import ManagedProcess
from cli.embedded.servers import HOST, EtcdServer, NatsServer, RedisServer, free_port
from tests.fork_server import ForkedPart, needs_own_start

ROOT = Path(__file__).resolve().parent.parent
START_S = 60.0
"""For a part to be ready on a busy machine."""
MODULES = {"gateway": "gateway", "worker": "workers"}


class Process(Protocol):
    """A gateway, a worker, or what a server runs in. `ManagedProcess` says what each of these promises."""

    name: str
    log_file: Path

    @property
    def pid(self) -> int | None: ...
    @property
    def running(self) -> bool: ...
    async def start(self) -> None: ...
    async def stop(self, grace_s: float = 2.0) -> int | None: ...
    async def wait(self) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def tail(self, lines: int = 20) -> str: ...


class Server(Protocol):
    """A server. `EmbeddedServer` says what each of these promises."""

    @property
    def url(self) -> str:
        """From where the tests run."""

    @property
    def port(self) -> int: ...
    @property
    def log_file(self) -> Path: ...
    @property
    def process(self) -> Process: ...
    @property
    def running(self) -> bool: ...
    async def start(self) -> None: ...
    async def stop(self, grace_s: float = 2.0) -> None: ...
    async def restart(self) -> None: ...
    def kill(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def wipe(self) -> None: ...


class Source(Protocol):
    """Makes them; nothing runs before its `start`."""

    processes: bool
    """Whether gateways and workers are processes of this machine."""
    borrowed: bool
    """Whether the servers are somebody else's: one of each kind, and not to be stopped."""

    @property
    def here(self) -> str:
        """The address where gateways and workers reach what the test itself runs: doubles, receivers of webhooks."""

    def nats(self, folder: Path) -> Server: ...
    def etcd(self, folder: Path) -> Server: ...
    def redis(self, folder: Path) -> Server: ...
    def nats_cluster(self, folder: Path, size: int) -> list[Server]: ...

    def part(
        self,
        kind: str,
        name: str,
        folder: Path,
        servers: Mapping[str, Server],
        settings: Mapping[str, str],
        ready: Callable[[], Awaitable[bool]] | None = None,
    ) -> Process:
        """A `gateway` or `worker`. `servers` by the setting that names them, as NATS_URL."""

    async def release(self, *parts: Server | Process) -> None:
        """Let go of these, whatever was done to them."""

    def close(self) -> None:
        """The run is over: nothing that was started stays."""


class EmbeddedSource:
    """Processes on 127.0.0.1."""

    here = HOST
    processes = True
    borrowed = False

    def nats(self, folder: Path) -> Server:
        return NatsServer(folder)

    def etcd(self, folder: Path) -> Server:
        return EtcdServer(folder)

    def redis(self, folder: Path) -> Server:
        return RedisServer(folder)

    def nats_cluster(self, folder: Path, size: int) -> list[Server]:
        ports = [free_port() for _ in range(size)]
        routes = ", ".join(f'"nats://{HOST}:{port}"' for port in ports)
        cluster = 'cluster {{ name: three, host: "{}", port: {}, routes: [{}] }}'
        return [
            NatsServer(folder / f"nats-{n}", extra_config=cluster.format(HOST, port, routes))
            for n, port in enumerate(ports)
        ]

    def part(
        self,
        kind: str,
        name: str,
        folder: Path,
        servers: Mapping[str, Server],
        settings: Mapping[str, str],
        ready: Callable[[], Awaitable[bool]] | None = None,
    ) -> Process:
        return local_part(kind, name, folder, servers, settings, ready)

    async def release(self, *parts: Server | Process) -> None:
        for part in parts:
            if part.running:
                part.resume()
        await asyncio.gather(*(part.stop() for part in parts))

    def close(self) -> None:
        """Children end with this process."""


def local_part(
    kind: str,
    name: str,
    folder: Path,
    servers: Mapping[str, Server],
    settings: Mapping[str, str],
    ready: Callable[[], Awaitable[bool]] | None,
) -> ManagedProcess:
    """A process of this tree's code."""
    process = ManagedProcess if needs_own_start(settings) else ForkedPart
    return process(
        name,
        [sys.executable, "-m", MODULES[kind]],
        log_file=log_file(kind, name, folder),
        env=local_environment({setting: server.url for setting, server in servers.items()} | dict(settings)),
        ready=ready,
        ready_timeout_s=START_S,
    )


def log_file(kind: str, name: str, folder: Path) -> Path:
    """Where a part's output goes."""
    return folder / (f"worker-{name}.log" if kind == "worker" else f"{name}.log")


def local_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with these settings, none of them its own, and the tree's code."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("WORKER_", "GATEWAY_"))}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return plain | {"PYTHONPATH": path, **settings}


class _Chosen:
    source: Source = EmbeddedSource()


def choose(option: str) -> None:
    """What `--servers` says. Raises `Unusable` where that cannot be had."""
    _Chosen.source = _source(option)


def _source(option: str) -> Source:
    if option == "containers":
        from tests.containers.source import ContainerSource

        return ContainerSource()
    if option == "external":
        from tests.external import ExternalSource

        return ExternalSource()
    return EmbeddedSource()


def source() -> Source:
    """Where this run's servers, gateways and workers come from."""
    return _Chosen.source


def here() -> str:
    """The address at which a test binds what gateways and workers shall reach."""
    return _Chosen.source.here


def skip_if_borrowed(why: str) -> None:
    """For a test that would notice too late, in the middle, or needs two servers of a kind."""
    if _Chosen.source.borrowed:
        pytest.skip(f"{why}: not with --servers external")


class Unusable(Exception):
    """What `--servers` asks for cannot be had here."""
