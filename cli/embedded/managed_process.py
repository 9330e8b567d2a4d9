"""One child process: started, waited for until it is ready, stopped, and never left behind.

Guarantees:
- A child is a session of its own: a terminal's Ctrl-C reaches only the parent, which stops its children in order.
- A child dies with the thread that started it, a SIGKILL of the parent included: at once by the kernel (Linux), and with
  its whole group by a guard (everywhere), which see: `guard`. Start children from the main thread.
- Nothing here is bound to an event loop: a process started on one loop can be stopped on another.

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

from cli.embedded.orphan_guard import ORPHAN_GUARD
from cli.private_files import open_private

LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[2]), 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):  # the parent died before that
    os._exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""
LOG_LIMIT = 10 * 1024 * 1024
"""Bytes of log above which the next start moves it aside to `<log>.1`."""
LOG_TAIL_BYTES = 8192
POLL_S = 0.02
PROBE_TIMEOUT_S = 1.0
"""Seconds that one look at readiness may take."""


class ProcessStartError(Exception):
    """A child process died at its start, or was not ready in time. The message ends with the tail of its log."""


def bind_to_parent(argv: Sequence[str], death_signal: signal.Signals = signal.SIGKILL) -> list[str]:
    """`argv` in a launcher that has the kernel signal the program when the thread that started it ends (Linux).

    The launcher is replaced by the program. Doing the same between fork and exec would be unsafe beside threads.
    Raises FileNotFoundError when there is no such program.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise FileNotFoundError(f"there is no program {argv[0]}")
    if not sys.platform.startswith("linux"):
        return [program, *argv[1:]]
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), str(int(death_signal)), program, *argv[1:]]


class ManagedProcess:
    """A child process with a name, a log file and a way to tell when it is ready."""

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
        """Describe a child; nothing runs yet.

        `log_file` takes its stdout and stderr, appended. `env` is its whole environment; None: ours. `ready` says
        whether the child serves; OSError and TimeoutError from it count as no. Without it a spawned child is ready.
        `death_signal` is what it gets when this process is killed; SIGKILL follows 3 s later. It inherits `pass_fds`.
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

    @property
    def pid(self) -> int | None:
        """The child's process id, also after its end; None before the first start."""
        return self._popen.pid if self._popen else None

    @property
    def running(self) -> bool:
        """Whether the child lives now, and has not been killed a moment ago."""
        return not self._killed and self._popen is not None and self.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How the child ended: negative is a signal's number; None while it runs or before its start."""
        return self.poll()

    def poll(self) -> int | None:
        """The exit code, without waiting."""
        if self._popen is None:
            return None
        code = self._popen.poll()
        if code is not None:
            self._unguard()
        return code

    async def start(self) -> None:
        """Spawn the child and wait until it is ready. Does nothing when it runs.

        Raises ProcessStartError when it dies first or is not ready in time; nothing is left running then.
        """
        if self.running:
            return
        await self.stop()  # one that was killed may still be dying
        self.spawn()
        try:
            await self.wait_ready()
        except BaseException:
            self.kill()
            self._reap()
            raise

    def spawn(self) -> None:
        """Start the child without waiting. Raises OSError when the program cannot be run."""
        argv = bind_to_parent(self.argv, self._death_signal)
        self._rotate_log()
        with open(self.log_file, "ab", opener=open_private) as log:
            self._log_start = log.tell()
            self._killed = False
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=None if self.env is None else dict(self.env),
                cwd=self.cwd,
                start_new_session=True,
                pass_fds=self._pass_fds,
            )
        ORPHAN_GUARD.add(self._popen.pid, self._death_signal, self._pass_fds)
        self._guarded = True

    async def wait_ready(self) -> None:
        """Return once the child is ready; at once when nothing tells that. Raises ProcessStartError."""
        if self._ready is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._ready_timeout_s
        while True:
            self._raise_if_ended()
            if await self._says_ready(self._ready):
                self._raise_if_ended()  # what answered may have been somebody else on its port
                return
            if loop.time() > deadline:
                raise ProcessStartError(
                    f"{self.name} was not ready within {self._ready_timeout_s:g} s{self._log_note()}"
                )
            await asyncio.sleep(POLL_S)

    async def wait(self) -> int:
        """Wait for the child's end and return its exit code. Any number of callers may wait."""
        popen = self._popen
        if popen is None:
            raise RuntimeError(f"{self.name} was never started")
        while (code := popen.poll()) is None:
            await _exit_of(popen.pid)
        if popen is self._popen:
            self._unguard()
        return code

    async def stop(self, grace_s: float = 2.0) -> int | None:
        """SIGTERM, then SIGKILL to its whole group after `grace_s`. Idempotent; returns the exit code.

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
        """SIGTERM, without waiting. Fine when it has ended."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL the child and all of its process group, without waiting. Fine when it has ended."""
        if self._popen is not None and self._popen.poll() is None:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: the child keeps its connections and answers nothing, from this call's return on."""
        if self._popen is not None and self.running:
            self._signal(signal.SIGSTOP)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._popen.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT: undo `pause`."""
        self._signal(signal.SIGCONT)

    def tail(self, lines: int = 20) -> str:
        """The last lines that the child has printed since its latest start; empty when there are none."""
        try:
            with self.log_file.open("rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    async def _says_ready(self, ready: Callable[[], Awaitable[bool]]) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return await ready()
        except OSError:  # TimeoutError is one
            return False

    def _raise_if_ended(self) -> None:
        code = self.poll()
        if code is not None:
            raise ProcessStartError(f"{self.name} ended with {_describe(code)} while starting{self._log_note()}")

    def _log_note(self) -> str:
        tail = self.tail()
        return f"; the end of {self.log_file}:\n{tail}" if tail else f"; {self.log_file} is empty"

    def _signal(self, number: signal.Signals) -> None:
        if self._popen is not None:
            self._popen.send_signal(number)  # does nothing when it has ended

    def _reap(self) -> None:
        if self._popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout=2.0)
                self._unguard()

    def _unguard(self) -> None:
        """It has ended: its pid may be another process's soon. What it has left behind is swept by its owner."""
        if self._guarded and self._popen is not None:
            self._guarded = False
            ORPHAN_GUARD.remove(self._popen.pid)

    def _rotate_log(self) -> None:
        self.log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            if self.log_file.stat().st_size > LOG_LIMIT:
                self.log_file.replace(self.log_file.with_name(self.log_file.name + ".1"))


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


async def _exit_of(pid: int) -> None:
    """Return when the child `pid` may have ended: told by the kernel where it can, after a short sleep elsewhere."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        await asyncio.sleep(POLL_S)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
