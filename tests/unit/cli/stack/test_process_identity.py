"""The identity of a process distinguishes it from a later one with the same pid."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from backbone.port_holders import find_port_holder
from cli.stack.process_identity import _by_ps, process_identity, send_signal
from tests.ports import free_port


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_identity_is_stable_and_ends_with_the_process(sleeper: subprocess.Popen[bytes]) -> None:
    """Two processes have two, a dead one has none."""
    identity = process_identity(sleeper.pid)
    assert identity
    assert identity == process_identity(sleeper.pid) != process_identity(os.getpid())
    assert _by_ps(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert process_identity(sleeper.pid) == _by_ps(sleeper.pid) == ""


@pytest.mark.parametrize("pidfd", [True, False], ids=["pidfd", "no_pidfd"])
def test_a_signal_reaches_its_process_alone(
    sleeper: subprocess.Popen[bytes], pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that has the pid of another time."""
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    identity = process_identity(sleeper.pid)
    assert not send_signal(sleeper.pid, "", signal.SIGKILL)
    assert not send_signal(sleeper.pid, identity + "0", signal.SIGKILL)
    assert not send_signal(0, identity, signal.SIGKILL)
    assert sleeper.poll() is None
    assert send_signal(sleeper.pid, identity, signal.SIGTERM)
    assert sleeper.wait(10) == -signal.SIGTERM
    assert not send_signal(sleeper.pid, identity, signal.SIGTERM)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="by lsof, which may be missing")
def test_the_holder_of_a_port_is_named() -> None:
    """Program and pid; its arguments, which may hold keys, are not."""
    script = "import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(); print(1, flush=True); input()"
    port = free_port()
    assert find_port_holder(port) == "another program"
    command = [sys.executable, "-c", script, str(port), "--key=secret"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        holder = find_port_holder(port)
        process.kill()
    assert f"(pid {process.pid})" in holder
    assert holder.startswith("python")
    assert "secret" not in holder
