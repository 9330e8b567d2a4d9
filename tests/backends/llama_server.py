"""A real llama.cpp server for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.embedded.llama_server import find_model
from cli.embedded.managed_process import bind_to_parent

START_S = 60.0
ROOT = Path(__file__).parents[2]


class LlamaServer:
    """A real llama.cpp server in a process of its own."""

    def __init__(self, port: int = 0) -> None:
        model = find_model()
        if model is None:
            message = "the local-models extra is not installed"
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)
        command = [sys.executable, "-m", "cli.embedded.llama_server", "--model", str(model), "--port", str(port)]
        command += ["--alias", "smollm2", "--ctx", "4096", "--parallel", "2"]
        self.process = subprocess.Popen(bind_to_parent(command), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = line.rpartition(" ")[2].strip()
        assert self.url.startswith("http://"), line

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def wait(self) -> LlamaServer:
        """Return when the model is loaded."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise AssertionError("llama.cpp did not become healthy")

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(10)


@contextmanager
def running_llama(port: int = 0) -> Iterator[LlamaServer]:
    server = LlamaServer(port)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)
