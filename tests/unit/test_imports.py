"""Each process imports what it uses: a heavy library that it leaves out is CPU of every start and memory of every process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from workers.backends.base import load_adapters

ROOT = Path(__file__).parents[2]
RUN = """
import atexit, runpy, sys
atexit.register(lambda: print("modules:", *(name for name, module in sys.modules.items() if module), file=sys.stderr))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
UNUSED = {"opentelemetry.sdk", "aiohttp.client", "rich", "pygments", "unittest", "backbone.testing"}
NO_WORKER = {"gateway", "fastapi", "starlette", "uvicorn", "redis", "httpx", "PIL", "av"}
ADAPTERS = sorted(name for name, kind in load_adapters().items() if kind.__module__.startswith("workers."))


def modules_of(program: list[str], variables: dict[str, str]) -> set[str]:
    """Return the modules that a program has imported when it finds that another process listens on its port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = {"GATEWAY_PORT": port, "OBSERVABILITY_PORT": port, "WORKER_OBSERVABILITY_PORT": port}
        done = subprocess.run(
            [sys.executable, "-c", RUN, *program],
            env=os.environ | ports | variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2, done.stdout + done.stderr
    return set(done.stderr.rpartition("modules:")[2].split())


@pytest.mark.parametrize("program", [["gateway"], ["cli.main", "gateway"]])
def test_gateway_imports_no_unused_library(program: list[str]) -> None:
    loaded = modules_of(program, {})
    assert {"gateway.composition_root", "structlog", "nats"} <= loaded
    assert not loaded & (UNUSED | {"workers"})


@pytest.mark.parametrize(("program", "kind"), [(["workers"], "echo"), (["cli.main", "worker"], "openai")])
def test_worker_imports_its_own_adapter_and_no_server(program: list[str], kind: str) -> None:
    loaded = modules_of(program, {"WORKER_BACKEND": kind, "WORKER_BACKEND_URL": "http://127.0.0.1:9"})
    assert {"workers.worker", "structlog", "nats"} <= loaded
    assert not loaded & (UNUSED | NO_WORKER)
    assert {name for name in ADAPTERS if f"workers.backends.{name}" in loaded} == {kind}
