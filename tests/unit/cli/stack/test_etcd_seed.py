"""Aliases and services of `nexus up` stay equal in the file and in etcd, through failures of either."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from backbone.registry.etcd import EtcdRegistry
from backbone.registry.etcd_client import EtcdClient
from cli.errors import ConsoleError
from cli.stack.data_dir import DataDir
from cli.stack.etcd_seed import EtcdSeeder
from schemas.errors import Unavailable
from schemas.presence import Alias, ServiceRecord
from tests.servers import Server

KEPT: dict[str, dict[str, Any]] = {
    "aliases": {"default-chat": {"targets": ["a", "größe"]}, "team/x": "a"},
    "services": {"tts": {"base_url": "http://tts:1", "zone": 4}},
}


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    data = DataDir(tmp_path / "nexus")
    data.prepare()
    return data


class Stack:
    """The tested part of `nexus up`, and a registry that sees what a gateway would see."""

    def __init__(self, data: DataDir, etcd: Server) -> None:
        self.data, self.etcd = data, etcd
        self.messages: list[str] = []
        self.gateway = EtcdRegistry(etcd.url)
        self.link = EtcdClient(etcd.url, probe_key="probe")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[EtcdSeeder]:
        seeder = EtcdSeeder(self.data, "/nexus/", self.messages.append)
        await seeder.start(self.etcd.url)
        await self.gateway.start()
        await self.link.open()
        try:
            yield seeder
        finally:
            await self.gateway.close()
            await self.link.close()
            await seeder.stop()

    @property
    def file(self) -> dict[str, Any]:
        return json.loads(self.data.operator_file.read_text()) if self.data.operator_file.exists() else {}

    async def holds(self, key: str) -> bool:
        try:
            return await self.link.get(key) is not None
        except Unavailable:
            return False

    def aliases(self) -> dict[str, tuple[str, ...]]:
        snapshot = self.gateway.snapshot
        return {name: alias.targets for name, alias in snapshot.aliases.items()} if snapshot else {}


@pytest.fixture
def stack(data: DataDir, own_etcd: Server) -> Stack:
    return Stack(data, own_etcd)


async def test_an_empty_etcd_is_seeded_before_start_returns(stack: Stack) -> None:
    """So that the gateway's first snapshot has all of it."""
    stack.data.save_operator_data(KEPT)
    async with stack.running():
        assert stack.aliases() == {"default-chat": ("a", "größe"), "team/x": ("a",)}
        assert stack.gateway.snapshot is not None
        assert stack.gateway.snapshot.services["tts"].model_extra == {"zone": 4}
    assert stack.file == KEPT


async def test_changes_of_any_client_are_saved(stack: Stack, eventually: Callable[..., Any]) -> None:
    """A gateway or etcdctl may set, change or remove records; only the owner can read the file."""
    async with stack.running():
        await stack.gateway.put_alias(Alias(name="x", targets=("a",)))
        await stack.gateway.put_service(ServiceRecord(name="tts", base_url="http://tts:1"))
        await stack.link.put("/nexus/aliases/team/y", b'"b"')
        await eventually(lambda: set(stack.file.get("aliases", ())) == {"x", "team/y"} and stack.file["services"])
        assert stack.file["aliases"]["team/y"] == "b"
        await stack.link.put("/nexus/aliases/team/y", b'["c"]')
        await stack.gateway.remove_alias("x")
        await eventually(lambda: stack.file["aliases"] == {"team/y": ["c"]})
        await stack.link.put("/nexus/models/m", b"{}")
        await stack.link.put("/nexus/aliases/team/y", b"garbage")
        await eventually(lambda: stack.file["aliases"] == {})
    assert stack.file["services"]["tts"]["base_url"] == "http://tts:1"
    assert stat.S_IMODE(stack.data.operator_file.stat().st_mode) == 0o600
    assert stack.messages == []


async def test_a_change_right_before_the_stop_is_saved(stack: Stack, eventually: Callable[..., Any]) -> None:
    """`stop` writes what was not yet written."""
    async with stack.running() as seeder:
        await stack.gateway.put_alias(Alias(name="x", targets=("a",)))
        await eventually(lambda: seeder._records)
    assert set(stack.file["aliases"]) == {"x"}


@pytest.mark.parametrize("left", ["kept", "wiped"])
async def test_etcd_killed_and_started_again(stack: Stack, eventually: Callable[..., Any], left: str) -> None:
    """Lost records are written again, and later changes are saved."""
    stack.data.save_operator_data(KEPT)
    async with stack.running():
        await stack.gateway.put_alias(Alias(name="x", targets=("a",)))
        await eventually(lambda: "x" in stack.file["aliases"])
        stack.etcd.kill()
        await (stack.etcd.restart() if left == "kept" else stack.etcd.start())
        for name in ("default-chat", "team/x", "x"):
            await eventually(lambda name=name: stack.holds(f"/nexus/aliases/{name}"))
        await stack.gateway.remove_alias("team/x")
        await eventually(lambda: set(stack.file["aliases"]) == {"default-chat", "x"})


async def test_an_etcd_that_kept_its_data_overrides_the_file(stack: Stack, eventually: Callable[..., Any]) -> None:
    """Records that were removed while it was not followed stay removed."""
    stack.data.save_operator_data(KEPT)
    async with stack.running() as seeder:
        assert seeder._task is not None
        seeder._task.cancel()
        await asyncio.gather(seeder._task, return_exceptions=True)
        await stack.gateway.remove_alias("default-chat")
        await stack.gateway.put_alias(Alias(name="x", targets=("a",)))
        await seeder.start(stack.etcd.url)
        await eventually(lambda: set(stack.file["aliases"]) == {"team/x", "x"})
        assert set(stack.aliases()) == {"team/x", "x"}


async def test_an_unreachable_etcd_does_not_block_the_start(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message says so; the file stays as it is."""
    monkeypatch.setattr("cli.stack.etcd_seed.SEED_TIMEOUT_S", 0.3)
    stack.data.save_operator_data(KEPT)
    stack.etcd.kill()
    seeder = EtcdSeeder(stack.data, "/nexus/", stack.messages.append)
    await seeder.start(stack.etcd.url)
    await seeder.stop()
    assert len(stack.messages) == 1
    assert stack.file == KEPT


async def test_a_failed_save_is_reported_and_retried(
    stack: Stack, eventually: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a full disk."""
    monkeypatch.setattr("cli.stack.etcd_seed.SAVE_RETRY_S", 0.05)
    write, full = stack.data.save_operator_data, [True]

    def keep(data: dict[str, dict[str, Any]]) -> None:
        if full:
            raise OSError(28, "No space left on device")
        write(data)

    monkeypatch.setattr(stack.data, "save_operator_data", keep)
    async with stack.running():
        await stack.gateway.put_alias(Alias(name="x", targets=("a",)))
        await eventually(lambda: stack.messages)
        assert "No space left on device" in stack.messages[0]
        full.clear()
        await eventually(lambda: "x" in stack.file.get("aliases", ()))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"aliases": []}', '{"aliases": "x"}'])
def test_a_file_that_cannot_be_read_is_not_overwritten(data: DataDir, content: str) -> None:
    """An edited file is reported before anything starts."""
    data.operator_file.write_text(content)
    with pytest.raises(ConsoleError, match="Fix the file"):
        EtcdSeeder(data, "/nexus/", print)
    assert data.operator_file.read_text() == content
