"""`pytest --servers external`: what it does with servers that somebody else runs."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import nats
import pytest
from redis.asyncio import Redis

from cli.embedded.managed_process import bind_to_parent
from cli.embedded.servers import EtcdServer, NatsServer, RedisServer
from tests.servers import ROOT

TEST = """
import nats
from redis.asyncio import Redis


async def test_that_leaves_things(own_nats, own_redis):
    await (await nats.connect(own_nats.url)).jetstream().add_stream(name="LEFT", subjects=["left"])
    await Redis.from_url(own_redis.url).set("left", "1")


async def test_that_finds_nothing(own_nats, own_redis):
    assert await (await nats.connect(own_nats.url)).jetstream().streams_info() == []
    assert await Redis.from_url(own_redis.url).dbsize() == 0


def test_that_kills(own_nats):
    own_nats.kill()
    assert False, "it was killed"
"""


class Somebody:
    """Three servers, and test runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nats, self.etcd = NatsServer(folder / "nats"), EtcdServer(folder / "etcd")
        self.redis = RedisServer(folder / "redis")
        (folder / "test_things.py").write_text(TEST)

    async def run(self, **without: str) -> tuple[int, str]:
        urls = {"NATS": self.nats.url, "ETCD": self.etcd.url, "REDIS": self.redis.url}
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        environment = alone | {f"NEXUS_TEST_{name}_URL": url for name, url in urls.items()} | without
        process = await asyncio.create_subprocess_exec(
            *bind_to_parent([sys.executable, "-m", "pytest", "-rs", "--servers", "external", "-p", "tests.conftest"]),
            *("-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), str(self.folder / "test_things.py")),
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode or 0, out.decode()


@pytest.fixture
async def somebody(tmp_path: Path):
    somebody = Somebody(tmp_path)
    servers = (somebody.nats, somebody.etcd, somebody.redis)
    await asyncio.gather(*(server.start() for server in servers))
    yield somebody
    await asyncio.gather(*(server.stop() for server in servers))


async def test_they_are_used_emptied_and_never_killed(somebody: Somebody) -> None:
    """Each test finds them empty, what would kill one is skipped, and nothing is left on them."""
    code, out = await somebody.run()
    assert code == 0, out
    assert "2 passed, 1 skipped" in out
    assert "stops, freezes or empties its nats" in out
    client = await nats.connect(somebody.nats.url)
    assert await client.jetstream().streams_info() == []
    await client.close()
    async with Redis.from_url(somebody.redis.url) as redis:
        assert await redis.dbsize() == 0


async def test_what_is_not_from_tests_is_not_touched(somebody: Somebody) -> None:
    """One key of somebody's is enough: the run says what it has found, and ends."""
    async with Redis.from_url(somebody.redis.url) as redis:
        await redis.set("precious", "1")
        code, out = await somebody.run()
        assert code == pytest.ExitCode.USAGE_ERROR, out
        assert "redis holds 1 keys" in out
        assert await redis.get("precious") == b"1"


async def test_a_missing_address_is_named(somebody: Somebody) -> None:
    code, out = await somebody.run(NEXUS_TEST_ETCD_URL="")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--servers external needs NEXUS_TEST_ETCD_URL" in out
