"""A command as a person runs it: on a terminal of its own, whose lines are as wide as they get."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fork_server import MODULES, forked, needs_own_start
from tests.servers import ROOT

COLORS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
END_S = 20.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What stood on the terminal, without colors, and the exit code; None: it was still running, and was stopped."""

    text: str
    code: int | None


async def on_terminal(
    *arguments: str, folder: Path, env: Mapping[str, str], until: str = "", timeout_s: float = 60.0
) -> Seen:
    """Run `python ARGUMENTS` until it ends, or until the pattern `until` is on the terminal. It is stopped then."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 1000, 0, 0))
    kept = {name: value for name, value in os.environ.items() if not re.match(r"(NEXUS|GATEWAY|WORKER)_", name)}
    process = await asyncio.create_subprocess_exec(
        *_command(arguments, env),
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), **env},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = bytearray()
    found = asyncio.Event()

    def read() -> None:
        try:
            part = os.read(ours, 65536)
        except OSError:  # nobody holds its other end
            part = b""
        seen.extend(part)
        if not part:
            loop.remove_reader(ours)
            found.set()
        elif until and re.search(until, plain(seen)):
            found.set()

    loop = asyncio.get_running_loop()
    loop.add_reader(ours, read)
    code: int | None = None
    try:
        async with asyncio.timeout(timeout_s):
            await found.wait()
            if not until or not re.search(until, plain(seen)):
                code = await process.wait()
    except TimeoutError:
        raise AssertionError(f"nothing more came within {timeout_s:g} s; the terminal has:\n{plain(seen)}") from None
    finally:
        loop.remove_reader(ours)
        await _stop(process)
        os.close(ours)
    return Seen(plain(seen), code)


def _command(arguments: tuple[str, ...], env: Mapping[str, str]) -> list[str]:
    if arguments[0] == "-m" and arguments[1] in MODULES and not needs_own_start(env):
        return [*forked(arguments[1]), *arguments[2:]]
    return [sys.executable, *arguments]


def plain(seen: bytes | bytearray) -> str:
    """Text without colors."""
    return COLORS.sub("", seen.decode(errors="replace")).replace("\r\n", "\n")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
