"""The servers of `nexus up` reject other users of the machine and web pages."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import ssl
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest
from etcd3aio import EtcdError
from etcd3aio.lease import LeaseService
from etcd3aio.maintenance import MaintenanceService
from nats.errors import Error as NatsError

from backbone.registry.auth import EtcdTls
from backbone.registry.etcd_client import create_channel
from cli.embedded.managed_process import bind_to_parent
from tests.conftest import run_sync
from tests.fork_server import forked
from tests.stack.test_up import Up, clean_environment

pytestmark = pytest.mark.timeout(180)

SECRETS = {
    "ca.crt",
    "etcd.crt",
    "etcd.key",
    "etcd-client.crt",
    "etcd-client.key",
    "nats-password",
    "redis-password",
    "etcd-root-password",
    "etcd-gateway-password",
    "etcd-worker-password",
}
ETCD_CALLS = (
    "/v3/kv/range",
    "/v3/kv/put",
    "/v3/cluster/member/list",
    "/v3/lease/grant",
    "/v3/lease/revoke",
    "/v3/maintenance/alarm",
    "/v3/maintenance/status",
    "/v3/auth/authenticate",
)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("strangers") / "nexus", "--no-local-models")
    run_sync(up.__aenter__())
    try:
        run_sync(up.is_up())
        yield up
    finally:
        run_sync(up.__aexit__())


def port(up: Up, part: str) -> int:
    return int(up.state()["ports"][part])


def secret(up: Up, name: str) -> str:
    return (up.data / "secrets" / name).read_text().strip()


async def test_nats_rejects_clients_without_credentials(up: Up) -> None:
    """Prompts pass through it."""
    for login in ({}, {"user": "nexus", "password": "guessed"}):
        with pytest.raises(NatsError, match="Authorization Violation"):
            await nats.connect(f"nats://127.0.0.1:{port(up, 'nats')}", allow_reconnect=False, **login)


async def test_redis_rejects_clients_without_credentials(up: Up) -> None:
    """A client that may write there could make an admin key within two seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port(up, "redis"))
    try:
        for command in (b"GET x", b"SET x y", b"CONFIG GET *", b"KEYS *", b"INFO"):
            writer.write(command + b"\r\n")
            assert (await reader.readline()).startswith(b"-NOAUTH"), command
    finally:
        writer.close()


@pytest.mark.parametrize("path", ETCD_CALLS)
async def test_etcd_rejects_web_pages(up: Up, path: str) -> None:
    """Simple requests, which browsers send without a preflight, from a foreign origin or to a foreign host."""
    headers = {"origin": "https://evil.example", "host": "evil.example", "content-type": "text/plain"}
    for scheme in ("http", "https"):
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=5) as client:
            with pytest.raises(httpx.TransportError):
                await client.post(f"{scheme}://127.0.0.1:{port(up, 'etcd')}{path}", content="{}", headers=headers)


async def test_etcd_rejects_clients_without_a_certificate(up: Up) -> None:
    """Leases and alarms need no password: the stack's certificates protect them."""
    address = f"127.0.0.1:{port(up, 'etcd')}"
    ca = (up.data / "secrets" / "ca.crt").read_bytes()
    for channel in (create_channel(address, False, EtcdTls()), create_channel(address, True, EtcdTls(ca=ca))):
        try:
            with pytest.raises(EtcdError):
                await LeaseService(channel).grant(60, timeout=2, max_attempts=1)
            with pytest.raises(EtcdError):
                await MaintenanceService(channel).status(timeout=2, max_attempts=1)
        finally:
            await channel.close()


async def test_etcd_requires_a_login_beside_the_certificate(up: Up) -> None:
    """A certificate allows a connection, not a request; and a web page cannot read the answer to a login."""
    folder = up.data / "secrets"
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    context.load_cert_chain(folder / "etcd-client.crt", folder / "etcd-client.key")
    url = f"https://127.0.0.1:{port(up, 'etcd')}"
    async with httpx.AsyncClient(base_url=url, verify=context, trust_env=False) as client:
        answer = await client.post("/v3/kv/range", json={"key": "Lw=="}, headers={"origin": "https://evil.example"})
        assert answer.status_code == 400
        assert "user name is empty" in answer.text
        assert "access-control-allow-origin" not in answer.headers
        login = {"name": "worker", "password": secret(up, "etcd-worker-password")}
        token = (await client.post("/v3/auth/authenticate", json=login)).json()["token"]
        put: dict[str, Any] = {"key": "L25leHVzL2FsaWFzZXMveA==", "value": "e30="}
        denied = await client.post("/v3/kv/put", json=put, headers={"authorization": token})
        assert "permission denied" in denied.text


async def test_etcd_peer_port_requires_a_certificate(up: Up) -> None:
    """Members talk there without any login."""
    command = Path(f"/proc/{up.state()['pids']['etcd']}/cmdline").read_text().split("\0")
    peer = command[command.index("--listen-peer-urls") + 1]
    for url in (peer, peer.replace("https", "http")):
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=5) as client:
            with pytest.raises(httpx.TransportError):
                await client.get(f"{url}/members")


def test_files_are_readable_by_their_owner_only(up: Up) -> None:
    """Folders are 0700; secrets and configurations in them are 0600."""
    assert {one.name for one in (up.data / "secrets").iterdir()} == SECRETS
    for folder in ("secrets", "logs", "nats", "etcd", "redis"):
        assert stat.S_IMODE((up.data / folder).stat().st_mode) == 0o700, folder
    files = ["key", "state.json", "worker.env", "gateway.env", "lock", "nats/nats.conf", "redis/redis.conf"]
    for name in (*files, "logs/gateway.log", "logs/nats.log", *(f"secrets/{name}" for name in SECRETS)):
        assert stat.S_IMODE((up.data / name).stat().st_mode) == 0o600, name


def test_no_secret_on_a_command_line_or_in_a_log(up: Up) -> None:
    """Every user can read command lines, and logs are shared."""
    secrets = {secret(up, name) for name in SECRETS if name.endswith("-password")} | {up.state()["key"]}
    shown = [Path(f"/proc/{pid}/cmdline").read_text() for pid in up.family() | {up.process.pid}]
    shown += [log.read_text() for log in (up.data / "logs").iterdir()]
    assert len(shown) > 12
    assert [text for text in shown for one in secrets if one in text] == []


def joining(up: Up, how: str) -> tuple[list[str], dict[str, str]]:
    """A command for one more worker, and its environment."""
    command = [*forked("cli.main"), "worker", "--backend", "echo", "--model", "joined", "--name", f"by-{how}"]
    ports = up.state()["ports"]
    match how:
        case "file":
            script = f". {shlex.quote(str(up.data / 'worker.env'))} && exec {shlex.join(command)}"
            return ["sh", "-c", script], clean_environment()
        case "flag":
            return [*command, "--data-dir", str(up.data)], clean_environment()
        case _:  # as scripts do that know the ports and no more
            urls = {"NATS_URL": f"nats://127.0.0.1:{ports['nats']}", "ETCD_URL": f"http://127.0.0.1:{ports['etcd']}"}
            return command, clean_environment(NEXUS_DATA_DIR=str(up.data), **urls)


@pytest.mark.parametrize("how", ["file", "flag", "ports"])
async def test_another_worker_joins(up: Up, tmp_path: Path, how: str) -> None:
    """With the file that `nexus up` names, the data directory, or ports from `state.json`."""
    assert str(up.data / "worker.env") in up.output
    command, environment = joining(up, how)
    with (tmp_path / "worker.log").open("w") as log:
        worker = subprocess.Popen(bind_to_parent(command), env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        deadline = asyncio.get_running_loop().time() + 60
        while f"by-{how}" not in (workers := (await up.command("workers", "--json"))[1]):
            assert worker.poll() is None, (tmp_path / "worker.log").read_text()
            assert asyncio.get_running_loop().time() < deadline, workers
        assert await up.chat_again("joined", "joined") == "joined"
    finally:
        worker.terminate()
        worker.wait(30)


async def test_a_backup_finds_the_running_stack(up: Up, tmp_path: Path) -> None:
    """It uses the credentials of a gateway."""
    code, output, error = await up.command("backup", str(tmp_path / "backup"), "--json")
    assert code == 0, error
    assert len(json.loads(output)["parts"]) >= 3


async def test_credentials_end_with_their_stack(tmp_path: Path) -> None:
    """Old credentials are rejected: each start makes new ones."""
    found = set()
    for _ in range(2):
        async with Up(tmp_path / "nexus", "--no-local-models") as up:
            await up.is_up()
            found.add(secret(up, "nats-password"))
            os.kill(up.process.pid, 15)
            assert await up.ended() == 0
        assert not (up.data / "secrets").exists()
        assert not (up.data / "worker.env").exists()
    assert len(found) == 2
