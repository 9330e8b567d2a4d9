"""Gateways, workers and `nexus` commands for tests, forked from a process that has imported them: the import is two thirds of the CPU of a start.

What runs is what `python -m gateway`, `python -m workers` and `python -m cli.main` run, with the same environment, session and output.
Where a start itself is tested, tests start the commands themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from backbone.lean_imports import lean_imports
from cli.embedded.managed_process import ManagedProcess

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "tests" / "fork_client.py"
MAX_ORDER_BYTES = 1024 * 1024
ORDER_TIMEOUT_S = 10.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MODULES = ("gateway", "workers", "cli.main")
PARTS = ("gateway", "workers")


def can_fork() -> bool:
    """Whether this system lets a grandchild become a child."""
    return sys.platform.startswith("linux") and hasattr(os, "pidfd_open")


def needs_own_start(names: Sequence[str] | Mapping[str, str]) -> bool:
    """Whether one of these variables changes how Python itself starts."""
    return not can_fork() or any(name.startswith(("PYTHON", "LD_")) for name in names)


def forked(module: str) -> list[str]:
    """The beginning of a command that runs `python -m MODULE`, one of `MODULES`.

    Its process hands its arguments, environment, folder and files over to a forked one, passes it signals, and ends as it does.
    """
    if not can_fork():
        return [sys.executable, "-m", module]
    return [sys.executable, "-I", "-S", str(CLIENT), _server().address, module]


def fork_up(arguments: Sequence[str], env: Mapping[str, str], cwd: Path, files: Mapping[int, int]) -> ForkedProcess:
    """Start `nexus up ARGUMENTS`, a child of this process, whose gateways and workers are forked, too.

    `files`: its files 0, 1 and 2, and this process's. A terminal as file 0 controls it, as that of a shell does.
    """
    order = {"module": "cli.main", "arguments": ["up", *arguments], "env": dict(env), "cwd": str(cwd), "forks": True}
    return ForkedProcess(_server().fork(order | {"death_signal": int(signal.SIGKILL)}, files))


class ForkedPart(ManagedProcess):
    """A `gateway` or `workers` process, forked. Whatever else is started as usual."""

    def _launch(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        if self.argv[-2:-1] != ["-m"] or self.argv[-1] not in PARTS:
            return super()._launch(log)
        order = {
            "module": self.argv[-1],
            "arguments": [],
            "env": dict(self.env or os.environ),
            "cwd": str(self.cwd or ""),
            "death_signal": int(self._death_signal),
        }
        process = ForkedProcess(_server().fork(order, {1: log.fileno(), 2: log.fileno()}, self._pass_fds))
        return cast("subprocess.Popen[bytes]", process)


class ForkedProcess:
    """The part of `subprocess.Popen` that `ManagedProcess` and tests use, for a child that another process started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Connection:
    """A connection to a process that forks and ends with this one."""

    def __init__(self, orders: socket.socket, address: str = "") -> None:
        self.address = address
        """Where `CLIENT` reaches that process."""
        self._socket = orders
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_ORDER_BYTES)
        self._lock = threading.Lock()

    def fork(self, order: dict[str, Any], files: Mapping[int, int], also: Sequence[int] = ()) -> int:
        """Return the id of a new process, a child of this one. It has `files`, by their numbers there, and also others."""
        adopt = ctypes.CDLL(None).prctl
        with self._lock:
            # Only meanwhile: what a test orphans is not this process's to reap.
            adopt(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                order = order | {"parent": os.getpid(), "files": list(files)}
                socket.send_fds(self._socket, [json.dumps(order).encode()], [*files.values(), *also])
                answer = self._socket.recv(64)
            finally:
                adopt(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert answer, "the process that forks gateways and workers has ended"
        return int(answer)


class _Running:
    server: _Connection | None = None


def _server() -> _Connection:
    _Running.server = _Running.server or _start()
    return _Running.server


def _start() -> _Connection:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    address = f"nexus-tests-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address}")
        listener.listen(64)
        fds = (theirs.fileno(), listener.fileno())
        command = [sys.executable, "-m", "tests.fork_server", *map(str, fds)]
        # It ends with its orders. The kernel's signal would come at the end of this thread, which may be a short one.
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=fds, start_new_session=True)
    theirs.close()
    return _Connection(ours, address)


class _Server:
    """Forks a process for each order, until the other side has ended."""

    def __init__(self, orders: socket.socket, listener: socket.socket | None = None) -> None:
        self._orders = orders
        self._selector = selectors.PollSelector()
        self._watch(orders, self._fork_orphan)
        if listener is not None:
            self._watch(listener, lambda: self._accept(listener))

    def _watch(self, file: socket.socket | int, act: Callable[[], object]) -> None:
        self._selector.register(file, selectors.EVENT_READ, act)

    def serve(self) -> None:
        """Return when there are no more orders. Never returns in the processes that it forks."""
        with contextlib.suppress(EOFError):
            while True:
                key, _ = self._selector.select()[0]  # what it does may be the end of another one
                key.data()

    def _fork_orphan(self) -> None:
        """Fork a process that becomes a child of the one that ordered it."""
        data, fds, _, _ = socket.recv_fds(self._orders, MAX_ORDER_BYTES, 8)
        if not data:
            raise EOFError
        reader, writer = os.pipe()
        between = os.fork()
        if not between:
            if os.fork():
                os._exit(0)  # so that the grandchild gets another parent
            os.setsid()
            os.write(writer, b"%d" % os.getpid())
            os.close(reader)
            os.close(writer)
            self._close()
            _become(json.loads(data), fds)
        os.close(writer)
        os.waitpid(between, 0)
        self._orders.send(os.read(reader, 64))
        for fd in (reader, *fds):
            os.close(fd)

    def _accept(self, listener: socket.socket) -> None:
        """Fork a process in the place of the one that has connected."""
        client, _ = listener.accept()
        client.settimeout(ORDER_TIMEOUT_S)
        _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            data, fds, _, _ = socket.recv_fds(client, MAX_ORDER_BYTES, 3) if user == os.getuid() else (b"", [], 0, "")
        except OSError:
            data = b""
        if not data:
            client.close()
            return
        child = os.fork()
        if not child:
            os.setsid()
            self._close()
            os.close(client.detach())
            order = {"parent": os.getppid(), "death_signal": int(signal.SIGKILL), "files": [0, 1, 2]}
            _become(json.loads(data) | order, fds)
        for fd in fds:
            os.close(fd)
        self._follow(child, client)

    def _follow(self, child: int, client: socket.socket) -> None:
        """Pass signals on to a child, and its end to the client. A client that is gone takes it along."""
        end = os.pidfd_open(child)

        def pass_signal() -> None:
            try:
                number = client.recv(16)
            except OSError:
                number = b""
            if not number:
                self._selector.unregister(client)
            signal.pidfd_send_signal(end, int(number or signal.SIGKILL))

        def ended() -> None:
            _, status = os.waitpid(child, 0)
            self._selector.unregister(end)
            os.close(end)
            with contextlib.suppress(KeyError):
                self._selector.unregister(client)
            with contextlib.suppress(OSError):
                client.send(b"%d" % os.waitstatus_to_exitcode(status))
            client.close()

        self._watch(client, pass_signal)
        self._watch(end, ended)

    def _close(self) -> None:
        """Close what is this process's alone, in one that it has forked."""
        for key in list(self._selector.get_map().values()):
            os.close(key.fileobj if isinstance(key.fileobj, int) else cast("socket.socket", key.fileobj).detach())


def _become(order: dict[str, Any], fds: list[int]) -> NoReturn:
    """Run a program in this process, as its own start would."""
    while os.getppid() != order["parent"]:
        time.sleep(0.001)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, order["death_signal"], 0, 0, 0)
    if os.getppid() != order["parent"]:
        os._exit(1)
    for number, fd in zip(order["files"], fds, strict=False):
        os.dup2(fd, number)
        os.close(fd)
    if os.isatty(0) and 0 in order["files"]:
        # The first terminal that a session opens controls it.
        os.close(os.open(os.ttyname(0), os.O_RDWR))
    os.environ.clear()
    os.environ.update(order["env"])
    if order["cwd"]:
        os.chdir(order["cwd"])
    _open_standard_files()
    module = order["module"]
    file = str(import_module(module).__file__)
    sys.argv = [file, *order["arguments"]]
    sys.orig_argv = [sys.executable, "-m", module, *order["arguments"]]
    if order.get("forks"):
        _fork_parts()
    program = {"gateway": "gateway.server", "workers": "workers.main"}.get(module, module)
    sys.exit(import_module(program).main())


def _open_standard_files() -> None:
    """Open them as Python does where they are these files from the start."""
    lines = 1 if os.isatty(1) or os.environ.get("PYTHONUNBUFFERED") else -1
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", lines, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _fork_parts() -> None:
    """Let `nexus up`, which this process becomes, fork its gateways and workers."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():
        os.close(ours.detach())
        os.setsid()
        _Server(theirs).serve()
        os._exit(0)
    theirs.close()
    _Running.server = _Connection(ours)
    # Its own process: nothing is undone.
    setattr(import_module("cli.stack.stack"), "ManagedProcess", ForkedPart)  # noqa: B010 - for mypy, a module's import is not its own


def _import_programs() -> None:
    """Import what is forked, as each would by itself."""
    with lean_imports():
        import gateway.server  # noqa: F401
        import workers.main  # noqa: F401
    from cli.app import COMMANDS

    for target, _ in COMMANDS.values():
        import_module(target.partition(":")[0])


if __name__ == "__main__":
    _import_programs()
    orders, listener = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:])
    _Server(orders, listener).serve()
