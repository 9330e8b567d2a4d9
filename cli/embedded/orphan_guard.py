"""A guard process that ends the children of a killed parent, with their own children, on any POSIX system.

The parent writes `+PID SIGNAL` and `-PID` into a pipe. The end of the pipe means that the parent has died. Linux's parent
death signal reaches direct children alone, and not those that are paused; other systems have no such signal.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

SCRIPT = """
import os, signal, sys, time

GRACE_S = 3.0

def start_time(pid):
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
        children[int(pid)] = (int(number[0]), start_time(pid))
    else:
        children.pop(int(pid), None)

# A pid with another start time is a new process: the child's pid was free to be reused, so its group has ended.
left = {pid: number for pid, (number, then) in children.items() if start_time(pid) in ("", then)}
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
    """Starts the guard process of one parent with the parent's first child, and keeps its list of children."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        self._popen: subprocess.Popen[bytes] | None = None

    def add(self, pid: int, death_signal: int, pass_fds: tuple[int, ...] = ()) -> None:
        """Send `death_signal` to the group that the child `pid` leads when this process dies, and SIGKILL 3 s later."""
        if self._popen is None or self._parent != os.getpid():  # a fork does not inherit its parent's guard
            self._parent = os.getpid()
            self._popen = _start(pass_fds)
        self._write(f"+{pid} {death_signal}\n")

    def remove(self, pid: int) -> None:
        """Forget a child that has ended and was waited for."""
        self._write(f"-{pid}\n")

    def _write(self, line: str) -> None:
        if self._popen is not None and self._popen.stdin is not None and self._parent == os.getpid():
            with suppress(OSError):  # the guard was killed; the parent death signal remains
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
"""The guard of this process. It runs nothing before the first child."""
