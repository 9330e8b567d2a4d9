"""A real Whisper in a process of its own, and something to hear."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import wave
from pathlib import Path

import httpx
import pytest

from cli.embedded import piper_server
from cli.embedded.managed_process import ManagedProcess
from cli.embedded.servers import free_port
from cli.embedded.whisper_server import MODEL_NAME, find_model

SENTENCE = "The quick brown fox jumps over the lazy dog."
PARAGRAPH = (
    "A small boat left the harbour before sunrise. Nobody on the pier knew where it was going. "
    "The captain had promised to return with fresh oranges and three letters from his brother. "
    "By noon the wind had turned, and heavy clouds came down from the northern mountains. "
    "Children counted the waves and argued about the color of the sea."
)
"""Some twenty seconds, without repetition: Whisper tries again and again on sound that repeats itself."""
START_S = 60.0


def skip_or_fail(extra: str) -> None:
    """In CI everything is there."""
    message = f"the {extra} extra is not installed"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def spoken(text: str, folder: Path) -> bytes:
    """A WAV in which Piper says it."""
    voice = piper_server.find_voice()
    if voice is None:
        skip_or_fail("local-speech")
    path = folder / "spoken.wav"
    command = [sys.executable, "-m", "piper", "-m", str(voice), "-f", str(path)]
    subprocess.run(command, input=text.encode(), check=True, capture_output=True, timeout=60)
    return path.read_bytes()


def repeated(sound: bytes, times: int) -> bytes:
    """The same WAV so many times over."""
    whole = io.BytesIO()
    with wave.open(io.BytesIO(sound)) as once, wave.open(whole, "wb") as out:
        out.setparams(once.getparams())
        frames = once.readframes(once.getnframes())
        for _ in range(times):
            out.writeframes(frames)
    return whole.getvalue()


class WhisperServer:
    """`python -m cli.embedded.whisper_server` with the shipped weights."""

    def __init__(self, folder: Path) -> None:
        model = find_model()
        if model is None:
            skip_or_fail("local-transcription")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = ManagedProcess(
            "whisper",
            [sys.executable, "-m", "cli.embedded.whisper_server", "--model", str(model), "--port", str(self.port)],
            log_file=folder / "whisper.log",
            ready=self.answers,
            ready_timeout_s=START_S,
        )

    @property
    def model(self) -> str:
        return MODEL_NAME

    async def answers(self) -> bool:
        return await self.health() is not None

    async def health(self) -> dict[str, object] | None:
        async with httpx.AsyncClient(trust_env=False, timeout=5) as http:
            try:
                return (await http.get(f"{self.url}/health")).json()
            except httpx.HTTPError:
                return None

    async def idle(self) -> bool:
        """Whether it hears nothing; also when it is not there."""
        health = await self.health()
        return health is None or health["busy"] == 0

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    async def spawn(self) -> None:
        """Start it, and do not wait."""
        self.process.spawn()
