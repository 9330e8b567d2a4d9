"""A small process that ends children whose parent was killed outright, their own children included, on any POSIX system.

The parent writes `+PID SIGNAL` and `-PID` into a pipe; when the pipe ends, so has the parent. Linux's parent death signal reaches
children alone, and not those that are paused; elsewhere there is none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

SCRIPT = """
import os, signal, sys, time

GRACE_S = 3.0

def started(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""

def kill(pid, number):
    try:
        os.killpg(pid, number)
        return True
    except OSError:
        return False

children = {}
for line in sys.stdin:
    pid, *number = line[1:].split()
    if line[0] == "+":
        children[int(pid)] = (int(number[0]), started(pid))
    else:
        children.pop(int(pid), None)

# A leader that is another process than then has no group of ours: its pid was free to be given away.
left = {pid: number for pid, (number, then) in children.items() if started(pid) in ("", then)}
for pid, number in left.items():
    kill(pid, number)
    kill(pid, signal.SIGCONT)
deadline = time.monotonic() + GRACE_S
while time.monotonic() < deadline and any([kill(pid, 0) for pid in left]):
    time.sleep(0.02)
for pid in left:
    kill(pid, signal.SIGKILL)
"""


class OrphanGuard:
    """The guard of one parent process. It is started with its first child."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        self._popen: subprocess.Popen[bytes] | None = None

    def add(self, pid: int, death_signal: int, pass_fds: tuple[int, ...] = ()) -> None:
        """Let the group that the child `pid` leads get `death_signal` when this process dies, and SIGKILL 3 s later."""
        if self._popen is None or self._parent != os.getpid():  # a fork has none of its own
            self._parent = os.getpid()
            self._popen = _start(pass_fds)
        self._write(f"+{pid} {death_signal}\n")

    def remove(self, pid: int) -> None:
        """The child has ended, and has been waited for."""
        self._write(f"-{pid}\n")

    def _write(self, line: str) -> None:
        if self._popen is not None and self._popen.stdin is not None and self._parent == os.getpid():
            with suppress(OSError):  # somebody killed it: the parent death signal is still there
                self._popen.stdin.write(line.encode())


def _start(pass_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,
        pass_fds=pass_fds,
    )


ORPHAN_GUARD = OrphanGuard()
"""This process's own. Nothing runs before the first child."""
