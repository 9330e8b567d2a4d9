"""`cp .env.example .env && docker compose up -d --wait`, on a real engine: one stack for the whole file, in a folder of its own.

Tests go in the order in which they stand here: the last ones stop the stack.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.embedded.servers import free_port
from tests.containers.engine import image_of, own_image, require_engine
from tests.servers import ROOT

pytestmark = [pytest.mark.xdist_group("compose"), pytest.mark.timeout(400)]

UP_S = 240


class Stack:
    """One `docker compose` project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = f"nexus-tests-{uuid.uuid4().hex[:8]}"
        self.port = free_port()
        shutil.copy(ROOT / "docker-compose.yml", folder)
        shutil.copytree(ROOT / "deploy" / "compose", folder / "deploy" / "compose")
        shutil.copytree(ROOT / "deploy" / "nats", folder / "deploy" / "nats")
        settings = (ROOT / ".env.example").read_text()
        # A free port, and no wait of 15 s for a worker that was killed; all else as it comes.
        (folder / ".env").write_text(f"{settings}\nGATEWAY_PORT={self.port}\nACK_WAIT_S=3\n")

    def compose(self, *words: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        env = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_HOST") if name in os.environ}
        command = ["docker", "compose", "--project-name", self.project, *words]
        done = subprocess.run(
            command, cwd=self.folder, env=env | {"NEXUS_VERSION": "tests"},
            capture_output=True, text=True, check=False, timeout=UP_S,
        )  # fmt: skip
        assert not ok or done.returncode == 0, f"{' '.join(words)}: {done.stderr[-3000:]}\n{self.logs()}"
        return done

    def logs(self) -> str:
        command = ["docker", "compose", "--project-name", self.project, "logs", "--tail", "20"]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False).stdout

    def up(self) -> None:
        self.compose("up", "--detach", "--wait", "--no-build")

    def run_in(self, service: str, *words: str, ok: bool = True) -> str:
        return self.compose("exec", "-T", service, *words, ok=ok).stdout

    @property
    def key(self) -> str:
        return self.run_in("gateway", "cat", "/var/lib/nexus/key").strip()

    def inspected(self, service: str) -> dict[str, Any]:
        container = self.compose("ps", "--all", "--quiet", service).stdout.split()[0]
        found = subprocess.run(["docker", "inspect", container], capture_output=True, text=True, check=True)
        return json.loads(found.stdout)[0]

    def ask(self, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        request.add_header("authorization", f"Bearer {key}")
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            request.add_header("content-type", "application/json")
        try:
            with urllib.request.urlopen(request, data, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def end(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5", ok=False)
        # What the containers wrote is theirs.
        wipe = ["docker", "run", "--rm", "--user", "0", "--volume", f"{self.folder}:/folder", "--entrypoint", "rm"]
        subprocess.run([*wipe, own_image("worker"), "-rf", "/folder/.runtime"], check=False, capture_output=True)


def until(true: Callable[[], Any], wait_s: float = 90) -> Any:
    deadline = time.monotonic() + wait_s
    while not (value := true()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)
    return value


def chat(text: str = "hello there", **more: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}]} | more


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    require_engine()
    for service in ("nats", "etcd", "redis"):
        there = subprocess.run(["docker", "image", "inspect", image_of(service)], capture_output=True, check=False)
        pulled = (
            there.returncode and subprocess.run(["docker", "pull", "-q", image_of(service)], check=False).returncode
        )
        if pulled:
            pytest.fail(f"{image_of(service)} is not here and cannot be pulled")
    own_image("gateway")
    own_image("worker")
    made = Stack(tmp_path_factory.mktemp("stack"))
    try:
        made.up()
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def key(stack: Stack) -> str:
    return stack.key


def test_a_chat_works_at_once(stack: Stack, key: str):
    """With the key that the first start made, on the port of .env."""
    assert re.fullmatch(r"nexus-\S{30,}", key)
    status, answer = stack.ask("/v1/chat/completions", chat(), key)
    assert status == 200
    assert "hello there" in answer["choices"][0]["message"]["content"]
    assert stack.ask("/readyz")[1]["status"] == "ready"


def test_another_key_is_refused(stack: Stack):
    """The made key is the only one."""
    for wrong in ("", "nexus-" + "x" * 32):
        status, answer = stack.ask("/v1/chat/completions", chat(), wrong)
        assert status == 401
        assert answer["error"]["type"] == "authentication_error"


def test_the_console_beside_the_gateway_needs_no_key(stack: Stack):
    """`docker compose exec gateway nexus status`."""
    status = json.loads(stack.run_in("gateway", "nexus", "status", "--json"))
    assert "echo" in json.dumps(status)


def test_one_port_is_published(stack: Stack):
    """The gateway's, on this host's own address."""
    rows = [json.loads(line) for line in stack.compose("ps", "--format", "json").stdout.splitlines()]
    ports = {(row["Service"], one["URL"], one["PublishedPort"]) for row in rows for one in row["Publishers"] or ()}
    assert {port for port in ports if port[2]} == {("gateway", "127.0.0.1", stack.port)}


@pytest.mark.parametrize("service", ["gateway", "worker"])
def test_processes_may_do_little(stack: Stack, service: str):
    """Another user than root, without any capability, and with a root that cannot be written to."""
    assert stack.run_in(service, "id", "-u").strip() == "10001"
    of_process = stack.run_in(service, "cat", "/proc/1/status")
    for line in ("CapEff", "CapPrm", "CapBnd"):
        assert re.search(rf"{line}:\s+0+$", of_process, re.MULTILINE)
    assert re.search(r"NoNewPrivs:\s+1$", of_process, re.MULTILINE)
    for place in ("/x", "/opt/nexus/x", "/usr/local/bin/x"):
        assert stack.compose("exec", "-T", service, "touch", place, ok=False).returncode != 0
    assert stack.run_in(service, "sh", "-c", "touch /tmp/x && echo written").strip() == "written"


def test_workers_have_no_key(stack: Stack):
    """Neither in their environment nor in a file."""
    assert "BEARER" not in stack.run_in("worker", "env")
    assert stack.compose("exec", "-T", "worker", "ls", "/var/lib/nexus/key", ok=False).returncode != 0


def test_a_worker_killed_amid_its_queue_loses_nothing(stack: Stack, key: str):
    """Each accepted job completes; the container comes back by itself."""
    body = chat("a b c d e f", echo={"delay_ms": 150})
    jobs = []
    for _ in range(12):
        status, job = stack.ask("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": body}, key)
        assert status == 202
        jobs.append(job["id"])
    until(lambda: any(stack.ask(f"/v1/jobs/{job}", key=key)[1]["status"] == "in_progress" for job in jobs))
    # The init process ends with the worker, which nobody asked the engine for: as a crash.
    stack.run_in("worker", "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)", ok=False)
    until(lambda: stack.inspected("worker")["RestartCount"] == 1)
    ended = until(lambda: _all_ended(stack, key, jobs))
    assert {job["status"] for job in ended} == {"completed"}
    assert max(job["attempts"] for job in ended) >= 2, "it was killed amid a job"


def _all_ended(stack: Stack, key: str, jobs: list[str]) -> list[dict[str, Any]] | None:
    found = [stack.ask(f"/v1/jobs/{job}", key=key)[1] for job in jobs]
    return None if any(job["status"] in {"queued", "in_progress"} for job in found) else found


def test_what_ends_in_order_says_so(stack: Stack):
    """SIGTERM, which `stop` sends, is an end with status 0."""
    stack.compose("stop", "gateway", "worker")
    for service in ("gateway", "worker"):
        state = stack.inspected(service)["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False)


def test_down_and_up_keeps_what_there_was(stack: Stack, key: str):
    """Jobs that wait, results, and the key: all are under ./.runtime."""
    stack.up()
    kept = {"endpoint": "/v1/chat/completions", "body": chat("keep me")}
    _, done = stack.ask("/v1/jobs", kept, key)
    until(lambda: stack.ask(f"/v1/jobs/{done['id']}", key=key)[1]["status"] == "completed")
    stack.compose("stop", "worker")
    status, waiting = stack.ask("/v1/jobs", kept, key)
    assert status == 202
    stack.compose("down")
    assert stack.compose("ps", "--all", "--quiet").stdout == ""
    stack.up()
    assert stack.key == key
    assert "keep me" in json.dumps(stack.ask(f"/v1/jobs/{done['id']}/result", key=key)[1])
    until(lambda: stack.ask(f"/v1/jobs/{waiting['id']}", key=key)[1]["status"] == "completed")
