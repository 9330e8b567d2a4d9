"""Finds the process that listens on a TCP port of this machine, as far as this user may see it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LISTENING = "0A"
"""The state LISTEN in /proc/net/tcp."""
LSOF_TIMEOUT_S = 3.0
UNKNOWN = "another program"


def find_port_holder(port: int, proc: Path = Path("/proc")) -> str:
    """Return the program and pid that listen on `port`, such as `ollama (pid 4711)`; `another program` when unknown."""
    if (proc / "net" / "tcp").exists():
        return _by_proc(port, proc)
    return _by_lsof(port)


def _by_proc(port: int, proc: Path) -> str:
    sockets = {f"socket:[{inode}]" for inode in _inodes(port, proc)}
    for folder in proc.iterdir() if sockets else ():
        if folder.name.isdigit() and _holds(folder, sockets):
            return f"{_program(folder)} (pid {folder.name})"
    return UNKNOWN


def _inodes(port: int, proc: Path) -> Iterator[str]:
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (proc / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _holds(folder: Path, sockets: set[str]) -> bool:
    """Return whether the process of `folder` has one of `sockets` open. Those of other users cannot be read."""
    with suppress(OSError):
        for entry in (folder / "fd").iterdir():
            with suppress(OSError):
                if str(entry.readlink()) in sockets:
                    return True
    return False


def _program(folder: Path) -> str:
    """Return the program's name. Arguments are left out: they may hold keys."""
    with suppress(OSError):
        arguments = (folder / "cmdline").read_bytes().split(b"\0")
        if b"-m" in arguments and b"gateway" in arguments:
            return "another Nexus gateway"
    with suppress(OSError):
        return (folder / "comm").read_text().strip()
    return "a program"


def _by_lsof(port: int) -> str:
    """Find the process by lsof, as on macOS."""
    if not (lsof := shutil.which("lsof")):
        return UNKNOWN
    command = [lsof, "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=LSOF_TIMEOUT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    found = {line[0]: line[1:] for line in reversed(output.splitlines()) if line}
    return f"{found['c']} (pid {found['p']})" if {"c", "p"} <= found.keys() else UNKNOWN
