"""`nexus up --detach`: the stack in a process that outlives its terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from select import select
from typing import BinaryIO

from cli.embedded.managed_process import rotate_log
from cli.errors import INTERRUPTED_EXIT_CODE
from cli.private_files import open_private
from cli.stack.data_dir import DataDir

READY_VARIABLE = "NEXUS_UP_READY_FD"
"""File descriptor to which a detached stack writes its welcome text once it is up; closed without text on failure."""
POLL_INTERVAL_S = 0.1


def start_detached(arguments: list[str], key: str, data: DataDir) -> int:
    """Run `nexus up` with these arguments in a session of its own, and show its output until it is up.

    Ctrl-C stops it during the start. Returns the exit code.
    """
    log = data.log("up")
    rotate_log(log)
    reader, writer = os.pipe()
    with open(log, "ab", opener=open_private) as out:
        start = out.tell()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cli.main", "up", "--key-file", "-", *arguments],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, READY_VARIABLE: str(writer), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            pass_fds=(writer,),
        )
    os.close(writer)
    with suppress(OSError):  # it has already ended, and its output says why
        if process.stdin is not None:
            process.stdin.write(f"{key}\n".encode())
            process.stdin.close()
    with log.open("rb") as output:
        output.seek(start)
        return _wait_until_up(process, reader, LogRelay(output))


class LogRelay:
    """Copies new output of the stack from its log to this command's output."""

    def __init__(self, log: BinaryIO) -> None:
        self._log = log

    def copy_new(self) -> None:
        """Copy what was written since the last call."""
        sys.stdout.buffer.write(self._log.read())
        sys.stdout.buffer.flush()


def _wait_until_up(process: subprocess.Popen[bytes], reader: int, relay: LogRelay) -> int:
    interrupted = False
    while True:
        try:
            while not select([reader], [], [], POLL_INTERVAL_S)[0]:
                relay.copy_new()
            welcome = _read_all(reader)
            if not welcome:
                code = process.wait()
            relay.copy_new()
            if welcome:
                sys.stdout.write(welcome)
                return 0
            return INTERRUPTED_EXIT_CODE if interrupted else code or 1
        except KeyboardInterrupt:
            interrupted = True
            process.send_signal(signal.SIGINT)


def _read_all(reader: int) -> str:
    with os.fdopen(reader, "rb", closefd=False) as pipe:
        return pipe.read().decode(errors="replace")


def report_ready(welcome: str) -> None:
    """Send the welcome text, which holds the key, to the command that started this process: it prints it and returns."""
    with (
        suppress(OSError),
        os.fdopen(int(os.environ.pop(READY_VARIABLE)), "wb") as pipe,
    ):  # the command may have been killed
        pipe.write(f"{welcome}\n".encode())


def is_detached() -> bool:
    """Return whether `start_detached` started this process and the stack is not up yet."""
    return READY_VARIABLE in os.environ


def ignore_hangup() -> None:
    """Ignore SIGHUP, so that the process outlives its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
