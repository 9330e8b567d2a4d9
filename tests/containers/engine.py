"""The Docker engine: whether one answers, this tree's images, and nothing left behind.

Everything that a run makes carries its label and the process it belongs to. It is removed when the run ends, also by
Ctrl-C; what a killed run left is removed by the next one. Ryuk, which does that for others, is not needed.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import subprocess
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import APIError, DockerException, NotFound
from ruamel.yaml import YAML

from tests.servers import ROOT, Unusable

RUN_LABEL = "nexus.tests.run"
OWNER_LABEL = "nexus.tests.owner"
"""Which process of which machine it belongs to: `<host>/<pid>`."""
REQUIRED = "NEXUS_REQUIRE_DOCKER"
COMPOSE = ROOT / "docker-compose.yml"

os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")  # read when testcontainers is imported


def absent() -> str:
    """Why no container can run here; empty where one can."""
    try:
        client = docker.from_env(timeout=10)
        client.ping()
        client.close()
    except DockerException as error:
        return f"no Docker engine answers: {error}"
    return ""


@functools.cache
def require_engine() -> str:
    """Skip, and say why, where no engine answers; where NEXUS_REQUIRE_DOCKER is set, fail. Returns "" otherwise."""
    why = absent()
    if why and os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1, but {why}")
    if why:
        pytest.skip(why)
    return why


def image_of(service: str) -> str:
    """The image of a service of docker-compose.yml: the one place that says which servers Nexus runs on."""
    services = YAML(typ="safe").load(COMPOSE.read_text())["services"]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", services[service]["image"])


@functools.cache
def own_image(target: str) -> str:
    """This tree's image, built unless the engine has built just this before."""
    image = f"nexus-{target}:tests"
    command = ["docker", "build", "--quiet", "--file", "deploy/Dockerfile", "--target", target, "--tag", image, "."]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    if built.returncode:
        raise Unusable(f"{' '.join(command)} failed: {built.stderr[-2000:]}")
    return image


class Engine:
    """One run's hold on the engine: a network for everything that the run starts. The network is made when first asked for."""

    def __init__(self) -> None:
        """Raises Unusable where no engine answers."""
        if why := absent():
            raise Unusable(f"--servers containers: {why}")
        self.run = os.environ.setdefault("NEXUS_TEST_RUN", uuid.uuid4().hex[:12])
        self._client = docker.from_env()
        self._network: Any = None
        self._making = threading.Lock()

    @property
    def labels(self) -> dict[str, str]:
        """On everything that is made here."""
        return {RUN_LABEL: self.run, OWNER_LABEL: f"{socket.gethostname()}/{os.getpid()}"}

    @property
    def network(self) -> Any:
        """testcontainers' Network."""
        with self._making:
            if self._network is None:
                from testcontainers.core.network import Network

                self._network = Network(docker_network_kw={"labels": self.labels}).create()
        return self._network

    @property
    def gateway_ip(self) -> str:
        """This machine, as containers of the network see it."""
        config = self._client.networks.get(self.network.name).attrs["IPAM"]["Config"]
        return str(config[0]["Gateway"])

    def disconnect(self, container: Any) -> None:
        """Unplug it: nothing comes or goes any more."""
        self._client.networks.get(self.network.name).disconnect(container)

    def connect(self, container: Any, alias: str) -> None:
        """Plug it in again, under the same name."""
        self._client.networks.get(self.network.name).connect(container, aliases=[alias])

    def sweep(self) -> None:
        """Remove what runs left whose processes have died."""
        self._remove(lambda labels: not _lives(labels[OWNER_LABEL]))

    def clean(self, *, whole_run: bool) -> None:
        """Remove what this process made, or all processes of its run."""
        own = self.labels
        self._remove(lambda labels: labels[RUN_LABEL] == self.run and (whole_run or labels == labels | own))

    def _remove(self, which: Any) -> None:
        wanted = {"label": [RUN_LABEL, OWNER_LABEL]}
        for container in self._client.containers.list(all=True, filters=wanted, ignore_removed=True):
            if which(container.labels):
                with suppress(NotFound, APIError):
                    container.remove(force=True, v=True)
        for network in self._client.networks.list(filters=wanted):
            if which(network.attrs["Labels"]):
                with suppress(NotFound, APIError):
                    network.remove()


def _lives(owner: str) -> bool:
    host, _, pid = owner.partition("/")
    return host != socket.gethostname() or Path(f"/proc/{pid}").exists()
