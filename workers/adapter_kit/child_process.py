"""Programs that do one piece of work and end: started without a shell, never outliving their task.

`subprocess` starts them rather than the event loop: uvloop's children inherit the pipes of one another, which then do not
end with the program that they belong to.
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

PIECE = 64 * 1024
"""Bytes read at once; at most twice as many wait unread, then the program is made to wait."""
COMPLAINT_LIMIT = 4096
"""Bytes kept of the end of what the program writes to its standard error."""


@asynccontextmanager
async def run_program(command: Sequence[str], given: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
    """The output of `command`, which is given `given` to read. Raises OSError when it cannot be started.

    The output ends with a BackendError, with the last line that the program complained with, unless the program ended with
    status 0; a transient one when it was killed. On leaving, the program is gone, and all that it started in its group.
    """
    with TemporaryFile() as file:  # no pipe: nobody has to feed it, and it may be left unread
        file.write(given)
        file.seek(0)
        process = Popen(command, stdin=file, stdout=PIPE, stderr=PIPE, bufsize=0, start_new_session=True)  # noqa: ASYNC220 - a millisecond
    with ExitStack() as pipes:
        try:
            said = await _reader(process.stdout, pipes)
            complained = asyncio.create_task(_tail(await _reader(process.stderr, pipes)))
            pipes.callback(complained.cancel)
            async with aclosing(_output(process, said, complained)) as output:
                yield output
        finally:
            _kill(process)
            await _end_of(process)


async def _output(process: Popen[bytes], said: StreamReader, complained: asyncio.Task[bytes]) -> AsyncGenerator[bytes]:
    while data := await said.read(PIECE):
        yield data
    status = await _end_of(process)
    _kill(process)  # what it left behind may hold its standard error
    if status:
        lines = (await complained).decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
        raise BackendError(f"the program {how}{f': {lines[-1]}' if lines else ''}", transient=status < 0)


async def _reader(pipe: IO[bytes] | None, pipes: ExitStack) -> StreamReader:
    """Reads `pipe`, until `pipes` is left; it is the transport's to close."""
    assert pipe is not None
    reader = StreamReader(PIECE)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    pipes.callback(transport.close)
    return reader


async def _tail(complaint: StreamReader) -> bytes:
    tail = b""
    while data := await complaint.read(COMPLAINT_LIMIT):
        tail = (tail + data)[-COMPLAINT_LIMIT:]
    return tail


async def _end_of(process: Popen[bytes]) -> int:
    """Its exit status. In a thread of its own: those that all share must not be taken up by waiting."""
    if process.returncode is not None:
        return process.returncode
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def tell(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    def wait() -> None:
        status = process.wait()
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, status)

    Thread(target=wait, daemon=True).start()
    return await ended


def _kill(process: Popen[bytes]) -> None:
    """The whole group: a program's own children too, also after itself has ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
