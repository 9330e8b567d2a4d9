"""`nexus up -d`: the same stack in a process of its own, which its terminal's end does not touch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from select import select
from typing import BinaryIO

from cli.embedded.managed_process import rotate_log
from cli.private_files import open_private
from cli.stack.data_dir import DataDir

READY_VARIABLE = "NEXUS_UP_READY_FD"
"""The descriptor into which a detached stack writes how to use it, once it is up; its end without a word: it is not."""
LOOK_S = 0.1
INTERRUPTED_EXIT_CODE = 130


def start_detached(arguments: list[str], key: str, data: DataDir) -> int:
    """Run `nexus up` with these arguments, show what it says until it is up, and return the exit code.

    Ctrl-C meanwhile stops it.
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
    with suppress(OSError):  # it has ended already, and says why
        if process.stdin is not None:
            process.stdin.write(f"{key}\n".encode())
            process.stdin.close()
    with log.open("rb") as said:
        said.seek(start)
        return _watch(process, reader, LogRelay(said))


class LogRelay:
    """What the stack has written since the last look, passed on to our own output."""

    def __init__(self, log: BinaryIO) -> None:
        self._log = log

    def show(self) -> None:
        """Pass on what is there."""
        sys.stdout.buffer.write(self._log.read())
        sys.stdout.buffer.flush()


def _watch(process: subprocess.Popen[bytes], reader: int, said: LogRelay) -> int:
    interrupted = False
    while True:
        try:
            while not select([reader], [], [], LOOK_S)[0]:
                said.show()
            welcome = _rest_of(reader)
            if not welcome:
                code = process.wait()
            said.show()
            if welcome:
                sys.stdout.write(welcome)
                return 0
            return INTERRUPTED_EXIT_CODE if interrupted else code or 1
        except KeyboardInterrupt:
            interrupted = True
            process.send_signal(signal.SIGINT)


def _rest_of(reader: int) -> str:
    with os.fdopen(reader, "rb", closefd=False) as pipe:
        return pipe.read().decode(errors="replace")


def tell_ready(welcome: str) -> None:
    """Let the command that has started this detached process show `welcome`, which holds the key, and return."""
    with (
        suppress(OSError),
        os.fdopen(int(os.environ.pop(READY_VARIABLE)), "wb") as pipe,
    ):  # nobody may wait for it any more
        pipe.write(f"{welcome}\n".encode())


def is_detached() -> bool:
    """Whether this process was started by `start_detached`, and is not up yet."""
    return READY_VARIABLE in os.environ


def ignore_hangup() -> None:
    """The terminal may go. `nohup` does the same."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
