"""docker-compose.prod.yml on a real engine, and a host of workers that has nothing but an address and its folder of secrets."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.embedded.servers import free_port
from tests.containers.engine import own_image, require_engine
from tests.deploy.production import Secrets
from tests.deploy.test_compose_running import Stack, chat, until
from tests.servers import ROOT

pytestmark = [pytest.mark.xdist_group("compose"), pytest.mark.timeout(400)]


def bridge_address() -> str:
    """An address of this host that containers of any network reach."""
    told = subprocess.run(["docker", "network", "inspect", "bridge"], check=True, capture_output=True, text=True).stdout
    return str(json.loads(told)[0]["IPAM"]["Config"][0]["Gateway"])


class Production(Stack):
    """The stack with users and TLS."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shutil.copy(ROOT / "docker-compose.prod.yml", folder)
        for name in ("etcd", "redis"):
            shutil.copytree(ROOT / "deploy" / name, folder / "deploy" / name)
        self.address, self.nats_port, self.etcd_port = bridge_address(), free_port(), free_port()
        self.secrets = Secrets(folder / ".runtime" / "secrets")
        self.secrets.make("--host", self.address)
        with (folder / ".env").open("a") as file:
            file.write(
                "COMPOSE_FILE=docker-compose.yml:docker-compose.prod.yml\n"
                f"NEXUS_BIND_ADDRESS={self.address}\nNEXUS_NATS_PORT={self.nats_port}\nNEXUS_ETCD_PORT={self.etcd_port}\n"
            )


class Workers(Stack):
    """Another host: its own project, network and folder."""

    def __init__(self, folder: Path, home: Production) -> None:
        super().__init__(folder)
        (folder / "docker-compose.yml").unlink()
        shutil.copy(ROOT / "docker-compose.worker.yml", folder)
        shutil.copytree(home.secrets.folder / "worker", folder / ".runtime" / "secrets" / "worker")
        (folder / ".env").write_text(
            "COMPOSE_FILE=docker-compose.worker.yml\nCOMPOSE_PROFILES=any\n"
            f"NATS_URL=tls://{home.address}:{home.nats_port}\nETCD_URL=https://{home.address}:{home.etcd_port}\n"
            "NATS_USER=worker\nNATS_PASSWORD_FILE=/etc/nexus/secrets/nats-password\nNATS_TLS_CA=/etc/nexus/secrets/ca.crt\n"
            "ETCD_USER=worker\nETCD_PASSWORD_FILE=/etc/nexus/secrets/etcd-password\nETCD_TLS_CA=/etc/nexus/secrets/ca.crt\n"
            "ETCD_TLS_CERT=/etc/nexus/secrets/etcd-client.crt\nETCD_TLS_KEY=/etc/nexus/secrets/etcd-client.key\n"
            "WORKER_BACKEND=echo\nWORKER_MODELS=far\nWORKER_NAME=far\nACK_WAIT_S=3\n"
        )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    require_engine()
    for target in ("gateway", "worker"):
        own_image(target)
    made = Production(tmp_path_factory.mktemp("production"))
    try:
        made.up()
        yield made
    finally:
        made.end()


def test_a_secured_stack_serves(home: Production) -> None:
    """Everything is ready, and a chat and a durable job go through."""
    assert home.ask("/readyz")[1]["status"] == "ready"
    assert home.ask("/v1/chat/completions", chat(), home.key)[0] == 200
    status, job = home.ask("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": chat()}, home.key)
    assert status == 202
    assert home.ask(f"/v1/jobs/{job['id']}?wait=20", key=home.key)[1]["status"] == "completed"


def test_a_host_of_workers_serves_from_elsewhere(home: Production, tmp_path: Path) -> None:
    """It reaches NATS and etcd by their published address, with the secrets of its folder alone."""
    far = Workers(tmp_path, home)
    try:
        far.up()
        wanted = chat() | {"model": "far"}
        until(lambda: home.ask("/v1/chat/completions", wanted, home.key)[0] == 200)
    finally:
        far.end()
    said = home.compose("logs", "nats").stdout
    assert "Violation" not in said


def test_a_rotated_password_needs_no_restart(home: Production) -> None:
    """Made again, copied, and the server told: gateway and worker come back by themselves."""
    before = home.inspected("gateway")["State"]["StartedAt"]
    home.secrets.make("--rotate", "nats-gateway", "--rotate", "nats-worker")
    home.compose("up", "--detach", "--no-build", "credentials")
    home.compose("wait", "credentials", ok=False)
    home.compose("kill", "--signal", "HUP", "nats")
    until(lambda: "nats.reconnected" in home.compose("logs", "worker").stdout)
    until(lambda: home.ask("/v1/chat/completions", chat(), home.key)[0] == 200)
    assert home.inspected("gateway")["State"]["StartedAt"] == before
