"""Servers that somebody else runs, empty and for tests alone: `pytest --servers external`.

One cluster at a time uses them, so there is one test process; each cluster, and each test with a server "of its own",
begins by emptying them. They are refused where anything lies on them that no test has left.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import urlsplit

import httpx
import nats
import pytest
import redis.asyncio
from nats.js.errors import NotFoundError

from tests.servers import Process, Server, Unusable, local_part

URLS = {"nats": "NEXUS_TEST_NATS_URL", "etcd": "NEXUS_TEST_ETCD_URL", "redis": "NEXUS_TEST_REDIS_URL"}
ETCD_PREFIX = "/nexus"
MARK = f"{ETCD_PREFIX}-tests"
"""An entry of etcd while tests run: the URLs of servers on which all that lies was left by tests."""
WAIT_S = 10


class ExternalServer:
    """A server that tests use, and neither stop nor freeze: what would do that skips the test."""

    def __init__(self, kind: str, url: str, folder: Path) -> None:
        self.kind = kind
        self.url = url
        self.port = urlsplit(url).port or 0
        self.log_file = folder / f"{kind}.log"
        self.pid: int | None = None
        self.running = True

    @property
    def process(self) -> Process:
        return cast("Process", self)

    async def start(self) -> None:
        """Empty it."""
        await EMPTY[self.kind](self.url)
        if self.kind == "etcd":
            await _mark(self.url)

    async def stop(self, grace_s: float = 2.0) -> NoReturn:
        self._refuse()

    async def restart(self) -> None:
        self._refuse()

    async def wait(self) -> int:
        self._refuse()

    def kill(self) -> None:
        self._refuse()

    def pause(self) -> None:
        self._refuse()

    def resume(self) -> None:
        """It was never paused."""

    def wipe(self) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        pytest.skip(f"stops, freezes or empties its {self.kind}: not done to an external one")


class ExternalSource:
    """Three URLs. Gateways and workers are processes of this machine."""

    here = "127.0.0.1"
    processes = True
    borrowed = True

    def __init__(self) -> None:
        """Raises Unusable where one is not given, not there, or holds what no test has left."""
        missing = [name for name in URLS.values() if not os.environ.get(name)]
        if missing:
            raise Unusable(f"--servers external needs {', '.join(missing)}")
        if "PYTEST_XDIST_WORKER" in os.environ:
            raise Unusable(
                "--servers external: its servers serve one cluster at a time, so run one process (WORKERS=0)"
            )
        self._urls = {kind: os.environ[name] for kind, name in URLS.items()}
        asyncio.run(self._check())

    async def _check(self) -> None:
        found = {}
        for kind, url in self._urls.items():
            try:
                async with asyncio.timeout(WAIT_S):
                    found[kind] = await FOUND[kind](url)
            except Exception as error:
                raise Unusable(f"--servers external: no {kind} at {URLS[kind]}: {error!r}") from error
        if any(found.values()) and not await _marked(self._urls["etcd"]):
            told = ", ".join(f"{kind} holds {what}" for kind, what in found.items() if what)
            raise Unusable(f"--servers external: {told}; tests would delete it. Give them empty servers")
        await _mark(self._urls["etcd"])
        for kind in ("nats", "redis"):
            await EMPTY[kind](self._urls[kind])

    def nats(self, folder: Path) -> Server:
        return ExternalServer("nats", self._urls["nats"], folder)

    def etcd(self, folder: Path) -> Server:
        return ExternalServer("etcd", self._urls["etcd"], folder)

    def redis(self, folder: Path) -> Server:
        return ExternalServer("redis", self._urls["redis"], folder)

    def nats_cluster(self, folder: Path, size: int) -> list[Server]:
        pytest.skip(f"needs {size} nats-servers that it may kill")

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
        """The next user empties the servers."""
        await asyncio.gather(*(part.stop() for part in parts if not isinstance(part, ExternalServer)))

    def close(self) -> None:
        asyncio.run(self._leave())

    async def _leave(self) -> None:
        """Empty, as they were given; the mark goes last."""
        for kind in ("nats", "redis", "etcd"):
            await EMPTY[kind](self._urls[kind])


# NATS: what is on it are streams; a key-value bucket is one.


async def _nats_found(url: str) -> str:
    client = await nats.connect(url, connect_timeout=3, allow_reconnect=False)
    try:
        names = [info.config.name for info in await client.jetstream().streams_info()]
        return ", ".join(sorted(map(str, names)))
    finally:
        await client.close()


async def _empty_nats(url: str) -> None:
    client = await nats.connect(url, connect_timeout=3)
    try:
        stream = client.jetstream()
        for info in await stream.streams_info():
            with suppress(NotFoundError):
                await stream.delete_stream(str(info.config.name))
    finally:
        await client.close()


async def _redis_found(url: str) -> str:
    async with redis.asyncio.from_url(url) as client:
        count = await client.dbsize()
        return f"{count} keys" if count else ""


async def _empty_redis(url: str) -> None:
    async with redis.asyncio.from_url(url) as client:
        await client.flushdb()


# etcd: through its JSON gateway, as scripts do. Only keys below ETCD_PREFIX are ours.


async def _etcd(url: str, what: str, **fields: Any) -> Any:
    coded = {
        name: base64.b64encode(value.encode()).decode() if isinstance(value, str) else value
        for name, value in fields.items()
    }
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{url}/v3/kv/{what}", json=coded)
    answer.raise_for_status()
    return answer.json()


def _below() -> dict[str, str]:
    return {"key": ETCD_PREFIX, "range_end": ETCD_PREFIX[:-1] + chr(ord(ETCD_PREFIX[-1]) + 1)}


async def _etcd_found(url: str) -> str:
    count = int((await _etcd(url, "range", **_below(), count_only=True)).get("count", 0))
    return f"{count} keys below {ETCD_PREFIX}" if count else ""


async def _empty_etcd(url: str) -> None:
    await _etcd(url, "deleterange", **_below())


def _ours() -> str:
    """These very servers: a mark that names others allows nothing."""
    return " ".join(os.environ[name] for name in URLS.values())


async def _mark(url: str) -> None:
    await _etcd(url, "put", key=MARK, value=_ours())


async def _marked(url: str) -> bool:
    entries = (await _etcd(url, "range", key=MARK)).get("kvs", [])
    return [base64.b64decode(entry["value"]).decode() for entry in entries] == [_ours()]


FOUND: dict[str, Callable[[str], Awaitable[str]]] = {"nats": _nats_found, "etcd": _etcd_found, "redis": _redis_found}
EMPTY: dict[str, Callable[[str], Awaitable[None]]] = {"nats": _empty_nats, "etcd": _empty_etcd, "redis": _empty_redis}
