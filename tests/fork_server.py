"""Gateways and workers for tests, forked from a process that has imported them already: the import is two thirds of the CPU of a start.

What runs is what `python -m gateway` runs, with the same environment, session and log. tests/stack starts real commands.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from backbone.lean_imports import lean_imports
from cli.embedded.managed_process import ManagedProcess, bind_to_parent

ROOT = Path(__file__).resolve().parent.parent
MAX_ORDER_BYTES = 1024 * 1024
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def can_fork() -> bool:
    """Whether this system lets a grandchild become a child."""
    return sys.platform.startswith("linux")


class ForkedPart(ManagedProcess):
    """A `gateway` or `workers` process, forked."""

    def _launch(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        order = {"module": self.argv[-1], "env": dict(self.env or os.environ), "death_signal": int(self._death_signal)}
        return cast("subprocess.Popen[bytes]", _Forked(_server().fork(order, log.fileno())))


class _Forked:
    """The part of `subprocess.Popen` that `ManagedProcess` uses, for a child that somebody else started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class _Server:
    """The process that forks; it ends with this one."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_ORDER_BYTES)
        command = [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())]
        self._process = subprocess.Popen(
            bind_to_parent(command),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()

    def fork(self, order: dict[str, Any], log: int) -> int:
        """Return the id of a new process, a child of this one."""
        adopt = ctypes.CDLL(None).prctl
        # Only meanwhile: what a test orphans is not this process's to reap.
        adopt(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self._socket, [json.dumps(order | {"parent": os.getpid()}).encode()], [log])
            answer = self._socket.recv(64)
        finally:
            adopt(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert answer, "the process that forks gateways and workers has ended"
        return int(answer)


class _Running:
    server: _Server | None = None


def _server() -> _Server:
    _Running.server = _Running.server or _Server()
    return _Running.server


def serve(orders: socket.socket) -> None:
    """Fork a process for each order, until the other side has ended."""
    with lean_imports():
        import gateway.server
        import workers.main
    mains: Mapping[str, Callable[[], int]] = {"gateway": gateway.server.main, "workers": workers.main.main}
    while True:
        data, fds, _, _ = socket.recv_fds(orders, MAX_ORDER_BYTES, 1)
        if not data:
            return
        reader, writer = os.pipe()
        between = os.fork()
        if not between:
            if os.fork():
                os._exit(0)  # so that the grandchild gets another parent
            os.setsid()
            os.write(writer, b"%d" % os.getpid())
            for fd in (reader, writer, orders.detach()):
                os.close(fd)
            _become(json.loads(data), fds[0], mains)
        os.close(writer)
        os.waitpid(between, 0)
        orders.send(os.read(reader, 64))
        for fd in (reader, *fds):
            os.close(fd)


def _become(order: dict[str, Any], log: int, mains: Mapping[str, Callable[[], int]]) -> None:
    """Run a program in this process, as its own start would. Never returns."""
    while os.getppid() != order["parent"]:
        time.sleep(0.001)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, order["death_signal"], 0, 0, 0)
    if os.getppid() != order["parent"]:
        os._exit(1)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(order["env"])
    sys.argv = [order["module"]]
    sys.exit(mains[order["module"]]())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
