"""Identities of processes: they distinguish a process from a later one with the same pid, also across reboots."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

PS_TIMEOUT_S = 5.0


def process_identity(pid: int) -> str:
    """Return the start time of the process and the id of the boot; empty if there is no such process."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return f"{boot} {fields[19]}" if fields[0] != "Z" else ""
        return ""
    return _by_ps(pid)


def _by_ps(pid: int) -> str:
    import subprocess  # takes 10 ms, and most commands do not need it

    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["ps", "-o", "lstart=", "-p", str(pid)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PS_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        ).stdout.strip()
    return ""


def send_signal(pid: int, identity: str, number: signal.Signals) -> bool:
    """Signal the process with this pid and identity. Returns False, without a signal, if it has ended."""
    if not identity or not hasattr(os, "pidfd_open"):
        return bool(identity) and process_identity(pid) == identity and _kill(pid, number)
    with suppress(OSError):
        fd = os.pidfd_open(pid)  # pins the process that is checked below
        try:
            if process_identity(pid) != identity:
                return False
            signal.pidfd_send_signal(fd, number)
            return True
        finally:
            os.close(fd)
    return False


def _kill(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True
