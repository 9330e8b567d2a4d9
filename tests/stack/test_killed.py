"""A killed `nexus up` or test run leaves no process: the tests scan all processes of this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.embedded.managed_process import bind_to_parent
from tests.servers import ROOT, local_environment
from tests.stack.test_up import DOWN_S, UP_S, Up, eventually_true

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="scans /proc"),
]

LEFT_S = 5.0
"""Time within which all processes have ended."""
HANGS = """
import asyncio, pathlib, sys
from tests.cluster import Cluster
from tests.stack.test_up import Up

async def test_hangs(tmp_path):
    async with Cluster(tmp_path) as cluster, Up(tmp_path / "nexus", "--no-local-models", "--gateways", "2") as up:
        await cluster.start_gateway()
        await cluster.start_worker("echo")
        await up.is_up()
        pathlib.Path(FOLDER, "up").touch()
        await asyncio.sleep(600)
"""


def processes_of(folder: Path, besides: int = 0) -> dict[int, str]:
    """All living processes that have `folder` in their command line, environment, working directory or open files."""
    found = {}
    for one in Path("/proc").iterdir():
        if one.name.isdigit() and int(one.name) not in (os.getpid(), besides) and _has(one, str(folder)):
            found[int(one.name)] = (one / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def _has(process: Path, folder: str) -> bool:
    try:
        if (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        texts = [(process / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]
        texts += [str((process / "cwd").readlink()), *(str(fd.readlink()) for fd in (process / "fd").iterdir())]
    except OSError:
        return False
    return any(folder in text for text in texts)


async def none_left(folder: Path) -> None:
    deadline = time.monotonic() + LEFT_S
    while left := processes_of(folder):
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("paused", [(), ("nats", "redis", "gateway")], ids=["running", "some_paused"])
async def test_killed_stack_leaves_no_process(tmp_path: Path, paused: tuple[str, ...]) -> None:
    """Servers, gateways' own processes and workers; paused ones, which no polite signal ends, as well. Another start
    finds what was confirmed before.
    """
    data = tmp_path / "nexus"
    async with Up(data, "--no-local-models", "--gateways", "2", start=True) as up:
        await up.is_up()
        code, job, error = await up.command("submit", "chat", "-", stdin=JOB)
        assert code == 0, error
        for part in paused:
            os.kill(up.state()["pids"][part], signal.SIGSTOP)
        up.process.kill()
        up.process.wait()
        await none_left(data)
        code, _, error = await up.command("status")
        assert code == 1
        assert "nexus up" in error
    async with Up(data, "--no-local-models") as up:
        await up.is_up()
        code, output, error = await up.command("jobs", "show", job.strip())
        assert code == 0, error
        assert job.strip() in output


JOB = '{"model": "echo", "messages": [{"role": "user", "content": "kept"}], "echo": {"first_delay_ms": 60000}}'


async def test_killed_stack_comes_up_again_at_once(tmp_path: Path) -> None:
    """The next start waits for the processes of the last one: they share neither data nor ports."""
    data = tmp_path / "nexus"
    async with Up(data, "--no-local-models", "--gateways", "2", start=True) as first:
        await first.is_up()
        os.kill(first.state()["pids"]["nats"], signal.SIGSTOP)
        first.process.kill()
        async with Up(data, "--no-local-models", "--gateways", "2") as second:
            second.port = first.port
            await second.is_up()
            assert not [pid for pid in first._family if pid in processes_of(data)]
            second.process.send_signal(signal.SIGTERM)
            assert await second.ended() == 0


@pytest.mark.parametrize("several", [(), ("-n", "2")], ids=["alone", "xdist"])
async def test_killed_test_run_leaves_no_process(tmp_path: Path, several: tuple[str, ...]) -> None:
    """Its servers, gateways and workers, and the `nexus up` that a test has started."""
    (tmp_path / "test_hanging.py").write_text(HANGS.replace("FOLDER", repr(str(tmp_path))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--basetemp", str(tmp_path / "base"), *several, str(tmp_path)]
    environment = {name: value for name, value in local_environment({}).items() if not name.startswith("PYTEST_XDIST")}
    with (tmp_path / "out").open("w") as out:
        run = subprocess.Popen(bind_to_parent(command), cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        await eventually_true(
            lambda: (tmp_path / "up").exists() or run.poll() is not None, "the test's stack is up", within_s=UP_S
        )
        assert run.poll() is None, (tmp_path / "out").read_text()
        assert len(processes_of(tmp_path, run.pid)) > 12
    finally:
        run.kill()
        run.wait(DOWN_S)
    await none_left(tmp_path)
