"""Child processes: started, waited for until they are ready, stopped, and never left behind.

Guarantees of `ManagedProcess`:
- A child leads a session and a process group of its own. Ctrl-C in a terminal reaches only the parent, which stops its
  children in order.
- A child dies with its parent, also when the parent is killed by SIGKILL: the kernel signals the child at once (Linux),
  and `orphan_guard` ends its whole group (any POSIX system). The kernel's signal follows the thread that started the
  child: start children from the main thread.
- No event loop owns a child: a process that one loop started can be stopped from another.

States: not started -> (start) -> running -> (exit by itself, stop, kill) -> ended -> (start) -> running …
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from cli.embedded.orphan_guard import ORPHAN_GUARD
from cli.private_files import open_private

LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[2]), 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):  # the parent died before that
    os._exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""
MAX_LOG_BYTES = 10 * 1024 * 1024
"""A start moves a log above this size to `<log>.1`."""
LOG_TAIL_BYTES = 8192
POLL_INTERVAL_S = 0.02
PROBE_TIMEOUT_S = 1.0
"""Time limit of one readiness probe."""
REAP_TIMEOUT_S = 2.0


class ProcessStartError(Exception):
    """A child process died while it started, or was not ready in time. The message ends with the tail of its log."""


def bind_to_parent(argv: Sequence[str], death_signal: signal.Signals = signal.SIGKILL) -> list[str]:
    """Return a command that runs `argv` and has the kernel signal it when the thread that started it ends (Linux).

    A launcher sets the signal and then replaces itself with the program: setting it between fork and exec would be unsafe
    beside threads. Raises FileNotFoundError if the program does not exist.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise FileNotFoundError(f"there is no program {argv[0]}")
    if not sys.platform.startswith("linux"):
        return [program, *argv[1:]]
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), str(int(death_signal)), program, *argv[1:]]


class ManagedProcess:
    """A child process with a name, a log file and a readiness probe."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        log_file: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        ready: Callable[[], Awaitable[bool]] | None = None,
        ready_timeout_s: float = 20.0,
        death_signal: signal.Signals = signal.SIGKILL,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        """Describe a child; nothing is started.

        `log_file` receives stdout and stderr, appended. `env` is the child's whole environment; None is this process's.
        `ready` returns whether the child serves; OSError and TimeoutError count as no. Without it, a child is ready once
        it is spawned. The child receives `death_signal` when this process dies, and SIGKILL 3 s later. It inherits
        `pass_fds`.
        """
        self.name = name
        self.argv = [str(part) for part in argv]
        self.env = env
        self.cwd = cwd
        self.log_file = log_file
        self._ready = ready
        self._ready_timeout_s = ready_timeout_s
        self._death_signal = death_signal
        self._pass_fds = pass_fds
        self._popen: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._killed = False
        self._guarded = False
        self._has_group = False

    @property
    def pid(self) -> int | None:
        """The child's process id, also after its end; None before the first start."""
        return self._popen.pid if self._popen else None

    @property
    def running(self) -> bool:
        """Whether the child is alive and `kill` has not been called."""
        return not self._killed and self._popen is not None and self.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit code; negative for the number of a signal, None while the child runs or before its start."""
        return self.poll()

    def poll(self) -> int | None:
        """Return the exit code without waiting; None while the child runs or before its start."""
        if self._popen is None:
            return None
        code = self._popen.poll()
        if code is not None:
            self._release_guard()
        return code

    async def start(self) -> None:
        """Spawn the child and wait until it is ready. Does nothing while it runs.

        Raises ProcessStartError if the child dies first or is not ready in time; nothing is left running then.
        """
        if self.running:
            return
        await self.stop()  # a killed child may still be dying
        self.spawn()
        try:
            await self.wait_ready()
        except BaseException:
            self.kill()
            self._reap()
            self.kill_leftovers()
            raise

    async def restart(self) -> None:
        """Stop the child if it runs, and start it again. Raises ProcessStartError."""
        await self.stop()
        await self.start()

    def spawn(self) -> None:
        """Start the child without waiting. Raises OSError if the program cannot be run."""
        self.log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        rotate_log(self.log_file)
        with open(self.log_file, "ab", opener=open_private) as log:
            self._log_start = log.tell()
            self._killed = False
            self._popen = self._launch(log)
        ORPHAN_GUARD.add(self._popen.pid, self._death_signal, self._pass_fds)
        self._guarded = self._has_group = True

    def _launch(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            bind_to_parent(self.argv, self._death_signal),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=None if self.env is None else dict(self.env),
            cwd=self.cwd,
            start_new_session=True,
            pass_fds=self._pass_fds,
        )

    async def wait_ready(self) -> None:
        """Wait until the child is ready; return at once without a probe. Raises ProcessStartError."""
        if self._ready is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._ready_timeout_s
        while True:
            self._raise_if_ended()
            if await self._is_ready(self._ready):
                self._raise_if_ended()  # another process on the same port may have answered
                return
            if loop.time() > deadline:
                raise ProcessStartError(
                    f"{self.name} was not ready within {self._ready_timeout_s:g} s{self._describe_log()}"
                )
            await asyncio.sleep(POLL_INTERVAL_S)

    async def wait(self) -> int:
        """Wait for the child's end and return its exit code. Any number of callers may wait."""
        popen = self._popen
        if popen is None:
            raise RuntimeError(f"{self.name} has not been started: call start() or spawn() first")
        while (code := popen.poll()) is None:
            await _wait_for_exit(popen.pid)
        if popen is self._popen:
            self._release_guard()
        return code

    async def stop(self, grace_s: float = 2.0) -> int | None:
        """Send SIGTERM, and SIGKILL to the whole group after `grace_s`. Idempotent. Returns the exit code.

        A paused child is resumed, so that it can end in order.
        """
        if self._popen is None:
            return None
        if not self.running:
            return await self.wait()
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                return await self.wait()
        self.kill()
        return await self.wait()

    def terminate(self) -> None:
        """Send SIGTERM without waiting. Does nothing after the child's end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the child and its whole process group, without waiting. Does nothing after the child's end."""
        if self._popen is not None and self._popen.poll() is None:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def kill_leftovers(self) -> None:
        """Send SIGKILL to processes that the ended child has left in its group. Does nothing while the child runs."""
        if self._popen is not None and self._has_group and self.poll() is not None:
            self._has_group = False  # once: an empty group's id may become another process's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def pause(self) -> None:
        """Send SIGSTOP: the child keeps its connections and answers nothing, from this call's return on."""
        if self._popen is not None and self.running:
            self._signal(signal.SIGSTOP)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._popen.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Send SIGCONT: undo `pause`."""
        self._signal(signal.SIGCONT)

    def tail(self, lines: int = 20) -> str:
        """Return the last lines that the child has printed since its latest start; empty if there are none."""
        try:
            with self.log_file.open("rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    async def _is_ready(self, ready: Callable[[], Awaitable[bool]]) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return await ready()
        except OSError:  # TimeoutError is one
            return False

    def _raise_if_ended(self) -> None:
        code = self.poll()
        if code is not None:
            raise ProcessStartError(
                f"{self.name} ended with {describe_exit(code)} while starting{self._describe_log()}"
            )

    def _describe_log(self) -> str:
        tail = self.tail()
        return f"; the end of {self.log_file}:\n{tail}" if tail else f"; {self.log_file} is empty"

    def _signal(self, number: signal.Signals) -> None:
        if self._popen is not None:
            self._popen.send_signal(number)  # does nothing after the child's end

    def _reap(self) -> None:
        if self._popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout=REAP_TIMEOUT_S)
                self._release_guard()

    def _release_guard(self) -> None:
        """Take the ended child from the guard: its pid may become another process's."""
        if self._guarded and self._popen is not None:
            self._guarded = False
            ORPHAN_GUARD.remove(self._popen.pid)


def describe_exit(code: int | None) -> str:
    """Return an exit code in words: `exit code 3`, `SIGKILL`."""
    if code is None:
        return "it was not running"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def rotate_log(log: Path) -> None:
    """Move a log that has grown beyond `MAX_LOG_BYTES` to `<log>.1`."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_name(f"{log.name}.1"))


async def _wait_for_exit(pid: int) -> None:
    """Return when the child `pid` may have ended: notified by the kernel on Linux, after a short sleep elsewhere."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        await asyncio.sleep(POLL_INTERVAL_S)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
