"""make-secrets.sh: what it makes, that it keeps what is there, and what a cluster makes of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest

from cli.embedded.servers import HOST, free_port
from tests.deploy.production import DEPLOY, ProductionNats, Secrets, worker_block


@pytest.fixture(scope="module")
def first_secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    made = Secrets(tmp_path_factory.mktemp("first") / "secrets")
    made.make()
    return made


@pytest.fixture
def secrets(first_secrets: Secrets, tmp_path: Path) -> Secrets:
    """The test's own, as a first run makes them."""
    return Secrets(Path(shutil.copytree(first_secrets.folder, tmp_path / "secrets", symlinks=True)))


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_a_second_run_changes_nothing(secrets: Secrets) -> None:
    """Whatever is there stays, to the byte."""
    before = contents(secrets.folder)
    secrets.make()
    assert contents(secrets.folder) == before


def test_nobody_else_can_read_them(secrets: Secrets) -> None:
    """0600, in folders of 0700."""
    modes = {
        (path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [secrets.folder, *secrets.folder.rglob("*")]
    }
    assert modes == {(True, 0o700), (False, 0o600)}


def test_a_worker_gets_its_own_secrets_alone(secrets: Secrets) -> None:
    """Its folder goes to other hosts."""
    files = {file.name for file in (secrets.folder / "worker").iterdir()}
    assert files == {"ca.crt", "nats-password", "etcd-password", "etcd-client.crt", "etcd-client.key"}


def test_a_clients_certificate_is_nobodys_name_and_no_servers(secrets: Secrets) -> None:
    """etcd takes a common name for the name of a user who has logged in: none of these has one, and none may serve."""
    secrets.make("--rotate", "certificates")
    for folder in ("gateway", "worker", "admin"):
        certificate = secrets.file(f"{folder}/etcd-client.crt")
        command = ["openssl", "verify", "-purpose", "sslclient", "-CAfile", secrets.file("ca/ca.crt"), certificate]
        subprocess.run(command, check=True, capture_output=True)
        as_server = [word.replace("sslclient", "sslserver") for word in command]
        assert subprocess.run(as_server, check=False, capture_output=True).returncode != 0
        told = subprocess.run(
            ["openssl", "x509", "-in", certificate, "-noout", "-subject"], check=True, capture_output=True, text=True
        ).stdout
        assert "CN" not in told
        assert folder in told


def test_certificates_are_for_servers_by_their_names(secrets: Secrets) -> None:
    """Chained to the authority, which is none of theirs; new names make new certificates, and keep the old names."""
    before = contents(secrets.folder)
    secrets.make("--host", "10.1.2.3", "--host", "nats.example")
    assert changed(before, contents(secrets.folder)) == {
        f"{name}/{name}.{end}" for name in ("nats", "etcd") for end in ("crt", "key")
    }
    for name in ("nats", "etcd", "redis"):
        certificate = secrets.file(f"{name}/{name}.crt")
        subprocess.run(
            ["openssl", "verify", "-CAfile", secrets.file("ca/ca.crt"), certificate], check=True, capture_output=True
        )
    told = subprocess.run(
        ["openssl", "x509", "-in", secrets.file("nats/nats.crt"), "-noout", "-text"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for expected in ("IP Address:10.1.2.3", "DNS:nats.example", "DNS:nats-2", "IP Address:127.0.0.1", "CA:FALSE"):
        assert expected in told
    again = contents(secrets.folder)
    secrets.make("--host", "10.1.2.3")
    assert contents(secrets.folder) == again


def test_one_password_is_rotated_alone(secrets: Secrets) -> None:
    """Only its file, and where its server has it."""
    before = contents(secrets.folder)
    secrets.make("--rotate", "nats-worker")
    assert changed(before, contents(secrets.folder)) == {"worker/nats-password", "nats/accounts.conf"}
    before = contents(secrets.folder)
    secrets.make("--rotate", "redis-gateway")
    assert changed(before, contents(secrets.folder)) == {"gateway/redis-password", "redis/users.acl"}
    before = contents(secrets.folder)
    secrets.make("--rotate", "passwords")
    assert "admin/etcd-password" not in changed(before, contents(secrets.folder))
    assert secrets.text("worker/nats-password") in (secrets.folder / "nats/accounts.conf").read_text()


def test_the_password_of_one_workers_user_is_rotated(secrets: Secrets) -> None:
    """By its name, and with all others; a name that nobody has is no rotation that is believed to have been."""
    worker_block(secrets.folder, "gpu1", "--model", "m")
    secrets.make("--worker", "gpu1")
    for what in ("nats-gpu1", "passwords"):
        before = secrets.text("worker-gpu1/nats-password")
        secrets.make("--rotate", what)
        after = secrets.text("worker-gpu1/nats-password")
        assert after != before
        assert (secrets.folder / "nats/accounts.conf").read_text().count(f'"{after}"') == 1
    with pytest.raises(subprocess.CalledProcessError) as refused:
        secrets.make("--rotate", "nats-gpu2")
    assert refused.value.returncode == 2


def test_a_worker_without_an_account_is_refused(secrets: Secrets) -> None:
    """What an earlier `nexus permissions worker` printed was a user of the gateways' account: it is to be printed again."""
    worker_block(secrets.folder, "gpu1", "--model", "m")
    secrets.make("--worker", "gpu1")
    accounts = (secrets.folder / "nats/accounts.conf").read_text()
    assert '"WORKER-gpu1" {' in accounts
    block = secrets.folder / "nats/workers/gpu1.conf"
    block.write_text('{\n  user: "gpu1"\n  password: $NATS_GPU1_PASSWORD\n  permissions: {}\n}\n')
    with pytest.raises(subprocess.CalledProcessError) as refused:
        secrets.make()
    assert b"nexus permissions worker gpu1" in refused.value.stderr
    assert (secrets.folder / "nats/accounts.conf").read_text() == accounts


def test_files_of_one_account_for_all_go(secrets: Secrets) -> None:
    """An installation that comes from there has no passwords left in files that no server reads."""
    for name in ("users.conf", "sys.conf"):
        (secrets.folder / "nats" / name).write_text("users: []\n")
    secrets.make()
    assert not list((secrets.folder / "nats").glob("[us]*s*.conf"))


def test_redis_gets_digests_alone(secrets: Secrets) -> None:
    """No password of Redis stands in its file of users."""
    password = secrets.text("gateway/redis-password")
    users = (secrets.folder / "redis/users.acl").read_text()
    assert password not in users
    assert hashlib.sha256(password.encode()).hexdigest() in users


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--what"], 2),
        (["--host"], 2),
        (["--host", "a b"], 2),
        (["--worker", "a.b"], 2),
        (["--worker", "admin"], 2),
        (["--days", "x"], 2),
        (["--worker", "new"], 1),
    ],
)
def test_wrong_use_is_refused(tmp_path: Path, options: list[str], status: int) -> None:
    """With the exit status for it, and a word on what to do."""
    script = DEPLOY / "scripts" / "make-secrets.sh"
    done = subprocess.run(
        [script, "--dir", tmp_path / "s", *options], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.strip()


class Node(ProductionNats):
    """One of three nodes of deploy/nats/cluster.conf."""

    def __init__(self, data_dir: Path, secrets: Secrets, routes: list[int], number: int) -> None:
        super().__init__(data_dir, secrets)
        self._routes, self._number = routes, number

    def _arguments(self) -> list[str]:
        arguments = super()._arguments()
        config = self.data_dir / "cluster.conf"
        text = config.read_text().replace("server_name: $NATS_SERVER_NAME", f"server_name: {self._identity}")
        text = text.replace("port: 6222", f'host: "{HOST}"\n  port: {self._routes[self._number]}')
        for n, port in enumerate(self._routes, 1):
            assert f"nats://nats-{n}:6222" in text
            text = text.replace(f"nats://nats-{n}:6222", f"nats://{HOST}:{port}")
        config.write_text(text)
        return ["cluster.conf" if argument == "nats.conf" else argument for argument in arguments]


@pytest.fixture
async def nodes(tmp_path: Path, secrets: Secrets) -> AsyncIterator[list[Node]]:
    worker_block(secrets.folder, "gpu1", "--model", "m")
    secrets.make("--worker", "gpu1")
    routes = [free_port() for _ in range(3)]
    made = [Node(tmp_path / f"nats-{n}", secrets, routes, n) for n in range(3)]
    await asyncio.gather(*(node.start() for node in made))
    yield made
    await asyncio.gather(*(node.stop() for node in made))


async def test_three_nodes_form_a_cluster(nodes: list[Node], secrets: Secrets) -> None:
    """With TLS between them, users and permissions; a stream of three replicas outlives any one."""
    client = await nats.connect(
        [node.url for node in nodes],
        user="gateway",
        password=secrets.text("gateway/nats-password"),
        tls=secrets.client_context,
        inbox_prefix="_INBOX.gateway",
    )
    try:
        wanted = json.dumps(
            {
                "name": "NEXUS_JOBS",
                "subjects": ["nexus.jobs.>"],
                "num_replicas": 3,
                "storage": "file",
                "retention": "workqueue",
            }
        )
        answer: dict[str, object] = {}
        for _ in range(100):
            try:
                answer = json.loads(
                    (await client.request("$JS.API.STREAM.CREATE.NEXUS_JOBS", wanted.encode(), timeout=2)).data
                )
            except nats.errors.Error:
                answer = {}
            if "config" in answer:
                break
            await asyncio.sleep(0.2)
        assert "config" in answer, answer
        nodes[0].kill()
        for _ in range(100):
            try:
                stored = json.loads((await client.request("nexus.jobs.chat.default.m", b"x", timeout=2)).data)
            except (nats.errors.Error, TimeoutError):
                await asyncio.sleep(0.2)
            else:
                break
        assert stored["stream"] == "NEXUS_JOBS"
    finally:
        await client.close()
