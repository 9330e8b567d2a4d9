"""`nexus up -d`, `down`, `logs` and `env` as a user runs them."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.embedded.managed_process import bind_to_parent
from cli.stack.data_dir import DataDir
from cli.stack.process_identity import process_identity
from tests.cluster import free_port
from tests.stack.test_killed import none_left, processes_of
from tests.stack.test_up import NEXUS, UP_S, clean_environment, eventually_true, run_nexus

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="scans /proc"),
]


class Detached:
    """A data directory with a stack that has no terminal."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "nexus"
        self.flags = ["--no-local-models", "--no-discover", "--port", str(free_port())]
        self.flags += ["--observability-port", str(free_port())]

    async def nexus(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        return await asyncio.to_thread(run_nexus, self.data, *arguments, **environment)

    def state(self) -> dict[str, Any]:
        return json.loads((self.data / "state.json").read_text())


@pytest.fixture
async def detached(tmp_path: Path) -> AsyncIterator[Detached]:
    detached = Detached(tmp_path)
    yield detached
    for pid in processes_of(detached.data):
        os.kill(pid, signal.SIGKILL)


async def test_up_returns_when_it_serves_and_down_ends_all(detached: Detached, tmp_path: Path) -> None:
    """The output is that of the foreground; every command finds the stack; printed commands can be pasted."""
    code, output, error = await detached.nexus("up", "-d", *detached.flags)
    assert (code, error) == (0, ""), output
    for wanted in ("NATS ", "up after", "Nexus is up.", "curl ", "worker.env", "down` stops everything."):
        assert wanted in output
    state = detached.state()
    assert state["key"] in output

    code, export, _ = await detached.nexus("env")
    assert code == 0
    assert export.strip() in output.splitlines()
    script = f"{export}\nexec {shlex.quote(sys.executable)} -c \"import os; print(os.environ['OPENAI_BASE_URL'])\""
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    async with httpx.AsyncClient(trust_env=False) as http:
        models = await http.get(f"{done.stdout.strip()}/models", headers={"authorization": f"Bearer {state['key']}"})
    assert models.status_code == 200

    code, _, error = await detached.nexus("up", "-d", *detached.flags)
    assert code == 1
    assert f"pid {state['pid']} at {state['url']}" in error
    assert "nexus down" in error

    assert await detached.nexus("chat", "-m", "hello") == (0, "hello\n", "")
    logs = (await detached.nexus("logs"))[1]
    assert {line.partition("|")[0].strip() for line in logs.splitlines()} >= {"nats", "gateway", "worker-echo", "up"}
    assert state["key"] not in logs
    assert (await detached.nexus("logs", "gateway", "-n", "1"))[1].count("\n") == 1
    code, _, error = await detached.nexus("logs", "nobody")
    assert code == 1
    assert "worker-echo" in error

    code, output, _ = await detached.nexus("down")
    assert (code, output.splitlines()[-1]) == (0, "Stopped.")
    assert not processes_of(detached.data)
    assert await detached.nexus("down") == (0, f"No Nexus runs on {detached.data}.\n", "")


async def test_detached_stack_outlives_its_terminal(detached: Detached, tmp_path: Path) -> None:
    """The terminal hangs up; the stack answers."""
    master, slave = pty.openpty()
    shell = subprocess.Popen(
        bind_to_parent(["sh", "-c", shlex.join([*NEXUS, "up", "-d", *detached.flags]) + "; echo returned; sleep 600"]),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=clean_environment(NEXUS_DATA_DIR=str(detached.data)),
        cwd=tmp_path,
        start_new_session=True,
    )
    os.close(slave)
    output = b""
    deadline = time.monotonic() + UP_S
    while b"returned" not in output:
        assert time.monotonic() < deadline, output
        output += await asyncio.to_thread(os.read, master, 4096)
    assert b"Nexus is up." in output
    os.close(master)
    os.killpg(shell.pid, signal.SIGHUP)
    shell.wait()
    pid = detached.state()["pid"]
    os.kill(pid, signal.SIGHUP)
    assert await detached.nexus("chat", "-m", "still here") == (0, "still here\n", "")
    assert detached.state()["pid"] == pid
    assert (await detached.nexus("down"))[0] == 0


async def test_failed_start_shows_the_log_and_exit_code(detached: Detached, tmp_path: Path) -> None:
    """The log, exit code 1, and no process left."""
    program = tmp_path / "etcd"
    program.write_text("#!/bin/sh\necho 'etcd: the disk is made of cheese' >&2\nexit 3\n")
    program.chmod(0o755)
    code, output, _ = await detached.nexus("up", "-d", *detached.flags, NEXUS_ETCD_BIN=str(program))
    assert code == 1
    assert "the disk is made of cheese" in output
    await none_left(detached.data)


async def test_ctrl_c_during_the_start_stops_it(detached: Detached, tmp_path: Path) -> None:
    """The command has not returned yet: the starting stack ends too."""
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            bind_to_parent([*NEXUS, "up", "-d", *detached.flags]),
            stdout=out,
            stderr=out,
            env=clean_environment(NEXUS_DATA_DIR=str(detached.data)),
            cwd=tmp_path,
            start_new_session=True,
        )
    await eventually_true(lambda: "up after" in (tmp_path / "out").read_text(), "the first part is up")
    process.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(process.wait, 30) == 130
    assert (tmp_path / "out").read_text().endswith("Stopped.\n")
    await none_left(detached.data)


@pytest.mark.parametrize("paused", [False, True], ids=["killed", "paused"])
async def test_down_handles_killed_and_paused_stacks(detached: Detached, paused: bool) -> None:
    """A killed stack has left files; a paused one was stopped by Ctrl-Z."""
    assert (await detached.nexus("up", "-d", *detached.flags))[0] == 0
    pid = detached.state()["pid"]
    if paused:
        os.kill(pid, signal.SIGSTOP)
        code, output, _ = await detached.nexus("down")
        assert (code, output.splitlines()[-1]) == (0, "Stopped.")
    else:
        os.kill(pid, signal.SIGKILL)
        assert (await detached.nexus("down"))[0] == 0
        code, _, error = await detached.nexus("status")
        assert (code, f"no `nexus up` runs on {detached.data}" in error) == (1, True)
        assert (await detached.nexus("up", "-d", *detached.flags))[0] == 0
        assert (await detached.nexus("down"))[0] == 0
    await none_left(detached.data)


async def test_down_does_not_signal_a_reused_pid(detached: Detached) -> None:
    """After a reboot, for example: another program has the pid in the files."""
    stranger = subprocess.Popen(bind_to_parent(["sleep", "600"]))
    try:
        data = DataDir(detached.data)
        data.prepare()
        data.lock_file.write_text(json.dumps({"pid": stranger.pid, "url": "", "identity": "another boot 1"}))
        assert await detached.nexus("down") == (0, f"No Nexus runs on {detached.data}.\n", "")
        with data.lock_file.open("a") as lock:  # a program that has not written down yet who it is, and never does
            fcntl.flock(lock, fcntl.LOCK_EX)
            code, _, error = await detached.nexus("down")
        assert code == 1
        assert "is not pid" in error
        assert process_identity(stranger.pid)
    finally:
        stranger.kill()
        stranger.wait()


async def test_logs_follow(detached: Detached, tmp_path: Path) -> None:
    """New lines are printed, also those of a replaced file; Ctrl-C ends the command without an error."""
    data = DataDir(detached.data)
    data.prepare()
    data.log("part").write_text("".join(f"line {n}\n" for n in range(100)) + "unfinished")
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            bind_to_parent([*NEXUS, "logs", "-f", "-n", "2", "part"]),
            stdout=out,
            stderr=out,
            env=clean_environment(NEXUS_DATA_DIR=str(detached.data)),
        )
    shown = (tmp_path / "out").read_text
    await eventually_true(lambda: shown() == "line 98\nline 99\n", "the last lines")
    with data.log("part").open("a") as log:
        log.write(" no more\n")
    await eventually_true(lambda: shown().endswith("unfinished no more\n"), "a new line")
    data.log("part").unlink()
    data.log("part").write_text("fresh\n")
    await eventually_true(lambda: shown().endswith("fresh\n"), "a new file")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert shown().count("\n") == 4
