"""Real servers for tests.

| fixture | scope | what |
|---|---|---|
| `nats_server`, `etcd_server`, `redis_server` | session | shared: never stop, pause or flush them |
| `nats_url`, `etcd_url`, `redis_url` | session | their URLs |
| `own_nats`, `own_etcd`, `own_redis` | function | the test's own, to kill, pause, restart |
| `etcd_prefix` | function | a key prefix that no other test uses |
| `eventually` | function | `await eventually(condition)`: poll until it is true, and return its value |

A server that cannot be had skips the test; where `CI` is set, it fails it.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cli.embedded.binaries import BinaryMissing
from cli.embedded.servers import EmbeddedServer, EtcdServer, NatsServer, RedisServer

T = TypeVar("T")
ServerType = TypeVar("ServerType", bound=EmbeddedServer)


def pytest_configure() -> None:
    """What chance decides is the same in every process of one run: xdist's workers inherit it."""
    os.environ.setdefault("NEXUS_TEST_LUCK", str(random.SystemRandom().randrange(10**9)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--servers", choices=["embedded"], default="embedded", help="where NATS, etcd and Redis come from")


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on a loop of its own, leaving the loops of pytest-asyncio alone."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


def running(server: ServerType) -> Iterator[ServerType]:
    """Start `server` for a fixture, and stop it afterwards, whatever the test did to it."""
    try:
        run_sync(server.start())
    except BinaryMissing as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    try:
        yield server
    finally:
        run_sync(server.stop())


@pytest.fixture(scope="session")
def servers_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def nats_server(servers_dir: Path) -> Iterator[NatsServer]:
    yield from running(NatsServer(servers_dir / "nats"))


@pytest.fixture(scope="session")
def etcd_server(servers_dir: Path) -> Iterator[EtcdServer]:
    yield from running(EtcdServer(servers_dir / "etcd"))


@pytest.fixture(scope="session")
def redis_server(servers_dir: Path) -> Iterator[RedisServer]:
    yield from running(RedisServer(servers_dir / "redis"))


@pytest.fixture(scope="session")
def nats_url(nats_server: NatsServer) -> str:
    return nats_server.url


@pytest.fixture(scope="session")
def etcd_url(etcd_server: EtcdServer) -> str:
    return etcd_server.url


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[NatsServer]:
    yield from running(NatsServer(tmp_path / "nats"))


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    yield from running(EtcdServer(tmp_path / "etcd"))


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    yield from running(RedisServer(tmp_path / "redis"))


@pytest.fixture
def etcd_prefix() -> str:
    return f"/nexus-{uuid.uuid4().hex}/"


class Eventually:
    """Poll a condition with a deadline: `value = await eventually(lambda: thing() or None)`."""

    async def __call__(
        self, condition: Callable[[], T | Awaitable[T]], *, timeout_s: float = 20.0, what: str = ""
    ) -> T:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            value = condition()
            if inspect.isawaitable(value):
                value = await value
            if value:
                return value
            if asyncio.get_running_loop().time() > deadline:
                pytest.fail(f"not within {timeout_s:g} s: {what or inspect.getsource(condition).strip()}")
            await asyncio.sleep(0.02)


@pytest.fixture
def eventually() -> Eventually:
    return Eventually()
