"""deploy.sh and remote-deploy.sh: a real git remote, a real engine; ssh is stood in for by the shell that it would start."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import free_port
from tests.containers.engine import require_engine
from tests.deploy.scripts import DONE, FAILED, MISSING, SCRIPTS, USAGE, Said, plain_environment, run

BASE = """\
services:
  folders:
    image: {image}
    command: ["true"]
    network_mode: none
  gateway:
    image: {image}
    init: true
    command: {command}
    labels: {{revision: "{revision}"}}
    ports: ["127.0.0.1:${{GATEWAY_PORT}}:8800"]
    depends_on: {{folders: {{condition: service_completed_successfully}}}}
    stop_grace_period: 1s
  worker:
    image: {image}
    init: true
    command: ["sleep", "600"]
    labels: {{revision: "{revision}"}}
    network_mode: none
    stop_grace_period: 1s
"""
SERVES = '["sh", "-c", "mkdir -p /tmp/w && echo ready > /tmp/w/readyz && exec python -m http.server -d /tmp/w 8800"]'
IMAGE = "python:3.13-slim-bookworm"
"""What the images of Nexus are made of."""


class Repository:
    """A remote, somebody who pushes to it, and a host with a checkout."""

    def __init__(self, folder: Path) -> None:
        self.origin, self.author, self.host = folder / "origin.git", folder / "author", folder / "host"
        self.port = free_port()
        self.project = f"nx-test-{uuid.uuid4().hex[:8]}"
        self._git(folder, "init", "--quiet", "--bare", "--initial-branch=main", str(self.origin))
        self._git(folder, "clone", "--quiet", str(self.origin), str(self.author))
        shutil.copytree(SCRIPTS, self.author / "deploy" / "scripts")
        (self.author / ".gitignore").write_text(".env\n.runtime/\n")
        (self.author / ".env.example").write_text("#GATEWAY_PORT=8800\n#GATEWAY_BEARER_TOKEN=\n")
        (self.author / "docker-compose.dev.yml").write_text("services: {}\n")

    def push(self, branch: str, revision: str, *, command: str = SERVES, image: str = IMAGE) -> str:
        text = BASE.format(image=image, command=command, revision=revision)
        (self.author / "docker-compose.yml").write_text(text)
        self._git(self.author, "add", "--all")
        self._git(self.author, "commit", "--quiet", "--message", revision)
        self._git(self.author, "push", "--quiet", "--force", "origin", f"HEAD:{branch}")
        return self._git(self.author, "rev-parse", "HEAD")

    def clone(self) -> None:
        self._git(self.origin.parent, "clone", "--quiet", str(self.origin), str(self.host))
        (self.host / ".env").write_text("GATEWAY_BEARER_TOKEN=nexus-0123456789abcdefghijkl\n")

    def here(self) -> str:
        return self._git(self.host, "rev-parse", "HEAD")

    @property
    def settings(self) -> dict[str, str]:
        return {"COMPOSE_PROJECT_NAME": self.project, "GATEWAY_PORT": str(self.port)}

    def deploy(self, *words: str) -> Said:
        return run(self.host / "deploy" / "scripts" / "deploy.sh", *words, cwd=self.host, **self.settings)

    def containers(self, service: str) -> dict[str, str]:
        """Ids of those that run, and the revision that each is of."""
        wanted = [
            f"--filter=label=com.docker.compose.{key}={value}"
            for key, value in (("project", self.project), ("service", service))
        ]
        form = '{{.ID}} {{.Label "revision"}}'
        lines = subprocess.run(
            ["docker", "ps", *wanted, "--format", form], capture_output=True, text=True, check=True
        ).stdout
        return dict(line.split(" ", 1) for line in lines.splitlines())

    def down(self) -> None:
        if self.host.exists():
            down = ["docker", "compose", "--project-name", self.project, "down", "--timeout", "1", "--volumes"]
            subprocess.run(
                down, cwd=self.host, env=plain_environment(**self.settings), capture_output=True, check=False
            )

    def _git(self, folder: Path, *words: str) -> str:
        config = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org", "-c", "init.defaultBranch=main")
        done = subprocess.run(["git", *config, *words], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made = Repository(tmp_path)
    made.push("main", "one")
    made.clone()
    try:
        yield made
    finally:
        made.down()


def test_a_deployment_rolls_and_a_broken_one_is_taken_back(repository: Repository) -> None:
    require_engine()
    first = repository.here()
    quick = ("--no-build", "--no-verify", "--timeout", "30")
    said = repository.deploy(*quick, "--scale", "worker=2", "dev", "main")
    assert said.code == DONE, said.all
    assert repository.here() == first
    gateways, workers = repository.containers("gateway"), repository.containers("worker")
    assert (len(gateways), len(workers)) == (1, 2)

    # The same again: nobody is disturbed.
    assert repository.deploy(*quick, "dev", "main").code == DONE
    assert repository.containers("gateway") == gateways
    assert repository.containers("worker") == workers

    # Another revision: as many as before, all of them new.
    second = repository.push("main", "two")
    said = repository.deploy(*quick, "dev", "main")
    assert said.code == DONE, said.all
    assert "worker: 2 new beside the old" in said.err
    assert set(repository.containers("gateway").values()) == set(repository.containers("worker").values()) == {"two"}
    assert len(repository.containers("worker")) == 2
    assert not set(workers) & set(repository.containers("worker"))

    # One that does not serve: what was there before serves again, and that is said.
    repository.push("main", "broken", command='["false"]')
    said = repository.deploy(*quick, "dev", "main")
    assert said.code == FAILED
    assert "runs again" in said.err
    assert second[:12] in said.err
    assert repository.here() == second
    assert set(repository.containers("gateway").values()) == {"two"}
    assert len(repository.containers("gateway")) == 1


def docker_on_path(tmp_path: Path) -> str:
    """Plans need no engine, but the scripts ask whether docker is installed."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    if not shutil.which("docker"):
        (tools / "docker").write_text("#!/bin/sh\nexit 1\n")
        (tools / "docker").chmod(0o755)
    return f"{tools}{os.pathsep}{os.environ['PATH']}"


def plan(repository: Repository, tmp_path: Path, *words: str) -> Said:
    script = repository.host / "deploy" / "scripts" / "deploy.sh"
    return run(script, "--dry-run", *words, cwd=repository.host, PATH=docker_on_path(tmp_path))


def test_a_plan_says_what_would_come_and_changes_nothing(repository: Repository, tmp_path: Path) -> None:
    before = repository.here()
    repository.push("next", "the next one")
    said = plan(repository, tmp_path, "dev", "next")
    assert said.code == DONE, said.all
    assert "the next one" in said.err
    assert "docker-compose.dev.yml" in said.err
    assert repository.here() == before


def test_what_would_lose_work_is_refused(repository: Repository, tmp_path: Path) -> None:
    (repository.host / "note").write_text("mine")
    dirty = plan(repository, tmp_path, "dev", "main")
    assert dirty.code == FAILED
    assert "?? note" in dirty.err
    repository._git(repository.host, "add", "note")
    repository._git(repository.host, "commit", "--quiet", "--message", "mine")
    ahead = plan(repository, tmp_path, "dev", "main")
    assert ahead.code == FAILED
    assert "has commits that origin/main does not have" in ahead.err


def test_what_is_not_there_is_named(repository: Repository, tmp_path: Path) -> None:
    unknown = plan(repository, tmp_path, "dev", "no-such-branch")
    assert unknown.code == FAILED
    assert "Its branches: main" in unknown.err
    assert plan(repository, tmp_path, "staging", "main").code == USAGE
    assert plan(repository, tmp_path, "dev").code == USAGE
    assert plan(repository, tmp_path, "--remote", "elsewhere", "dev", "main").code == MISSING


# --- remote-deploy.sh ---------------------------------------------------------------------------------------------------------

# What sshd does with the words after the host: one line for the user's shell, in the home folder.
SSH = """\
#!/bin/bash
printf '%s\\n' "$@" > "$SSH_SAID"
while [ "$1" != -- ]; do shift; done
shift 2
[ -z "$SSH_FAILS" ] || exit 255
cd "$SSH_HOME" && exec /bin/sh -c "$*"
"""


@pytest.fixture
def ssh(tmp_path: Path) -> dict[str, Any]:
    path = docker_on_path(tmp_path)
    (tmp_path / "tools" / "ssh").write_text(SSH)
    (tmp_path / "tools" / "ssh").chmod(0o755)
    return {"PATH": path, "SSH_SAID": str(tmp_path / "said"), "SSH_HOME": str(tmp_path), "SSH_FAILS": ""}


def test_another_host_deploys_itself(repository: Repository, ssh: dict[str, Any], tmp_path: Path) -> None:
    repository.push("it's;next", "the next one")
    options = ("--path", "host", "--port", "2222", "--identity", "/keys/it's mine")
    said = run("remote-deploy.sh", *options, "dev", "it's;next", "ann@gpu1", "--", "--dry-run", **ssh)
    assert said.code == DONE, said.all
    assert "the next one" in said.err
    words = (tmp_path / "said").read_text().splitlines()
    assert words[words.index("-p") + 1] == "2222"
    assert words[words.index("-i") + 1] == "/keys/it's mine"
    assert "BatchMode=yes" in words
    assert words[words.index("--") + 1] == "ann@gpu1"


def test_a_host_without_a_checkout_gets_one_when_asked(
    repository: Repository, ssh: dict[str, Any], tmp_path: Path
) -> None:
    words = ("--path", "~/a new one", "dev", "main", "ann@gpu1", "--", "--dry-run")
    missing = run("remote-deploy.sh", *words, **ssh)
    assert missing.code == MISSING
    assert "no checkout of Nexus in a new one" in missing.err
    cloned = run("remote-deploy.sh", "--clone", str(repository.origin), *words, **ssh)
    assert cloned.code == DONE, cloned.all
    env = tmp_path / "a new one" / ".env"
    assert env.read_text() == (repository.author / ".env.example").read_text()
    assert env.stat().st_mode & 0o777 == 0o600


def test_a_host_that_cannot_be_reached_and_wrong_words_are_told_apart(ssh: dict[str, Any]) -> None:
    away = run("remote-deploy.sh", "dev", "main", "ann@gpu1", **(ssh | {"SSH_FAILS": "1"}))
    assert away.code == 255
    assert "ssh does not get to ann@gpu1" in away.err
    for words in (("dev", "main"), ("test", "main", "h"), ("dev", "-main", "h"), ("dev", "main", "-oProxyCommand=x")):
        assert run("remote-deploy.sh", *words, **ssh).code == USAGE
