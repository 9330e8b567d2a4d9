"""Running a program for one task, without a shell; it never outlives the task.

`subprocess` starts programs rather than the event loop: uvloop's children inherit the pipes of one another, which then stay
open after the program that they belong to has exited.
"""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio import StreamReader
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from subprocess import PIPE, Popen
from tempfile import TemporaryFile
from threading import Thread
from typing import IO

from workers.backends.base import BackendError

PIECE_BYTES = 64 * 1024
"""Bytes read at once; at most twice as many wait unread, then the program is made to wait."""
STDERR_LIMIT = 4096
"""Bytes of the end of the program's standard error that are kept."""


@asynccontextmanager
async def run_program(command: Sequence[str], stdin_data: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
    """Run `command` with `stdin_data` as its input, and yield its output. Raises OSError when it cannot be started.

    The output ends with a BackendError, with the last line of the program's standard error, unless the program exited with
    status 0; the error is transient when the program was killed. On leaving, the program's whole process group is killed.
    """
    with TemporaryFile() as file:  # not a pipe: the program may leave it unread
        file.write(stdin_data)
        file.seek(0)
        process = Popen(command, stdin=file, stdout=PIPE, stderr=PIPE, bufsize=0, start_new_session=True)  # noqa: ASYNC220 - a millisecond
    with ExitStack() as pipes:
        try:
            stdout = await _open_reader(process.stdout, pipes)
            stderr_tail = asyncio.create_task(_read_tail(await _open_reader(process.stderr, pipes)))
            pipes.callback(stderr_tail.cancel)
            async with aclosing(_read_output(process, stdout, stderr_tail)) as output:
                yield output
        finally:
            _kill(process)
            await _wait_for_exit(process)


async def _read_output(
    process: Popen[bytes], stdout: StreamReader, stderr_tail: asyncio.Task[bytes]
) -> AsyncGenerator[bytes]:
    while data := await stdout.read(PIECE_BYTES):
        yield data
    status = await _wait_for_exit(process)
    _kill(process)  # its children may hold its standard error open
    if status:
        lines = (await stderr_tail).decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
        raise BackendError(f"the program {how}{f': {lines[-1]}' if lines else ''}", transient=status < 0)


async def _open_reader(pipe: IO[bytes] | None, pipes: ExitStack) -> StreamReader:
    """Return a reader of `pipe`, which is closed when `pipes` is left."""
    assert pipe is not None
    reader = StreamReader(PIECE_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    pipes.callback(transport.close)
    return reader


async def _read_tail(stderr: StreamReader) -> bytes:
    tail = b""
    while data := await stderr.read(STDERR_LIMIT):
        tail = (tail + data)[-STDERR_LIMIT:]
    return tail


async def _wait_for_exit(process: Popen[bytes]) -> int:
    """Return the exit status. It is awaited in a new thread, so that waiting does not occupy the shared ones."""
    if process.returncode is not None:
        return process.returncode
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[int] = loop.create_future()

    def set_status(status: int) -> None:
        if not exited.done():
            exited.set_result(status)

    def wait_in_thread() -> None:
        status = process.wait()
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(set_status, status)

    Thread(target=wait_in_thread, daemon=True).start()
    return await exited


def _kill(process: Popen[bytes]) -> None:
    """Kill the program's process group, with its children, even after the program itself has exited."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
