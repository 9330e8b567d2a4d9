"""Processes of the product do not load optional libraries that their libraries would load for features that Nexus does not use."""

from __future__ import annotations

import json as other_library
import os
import socket
import subprocess
import sys

import pytest

from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.connection import NatsConnection
from backbone.optional_libraries import hide_library
from schemas.errors import Unavailable


def test_hidden_library_is_found_again_after_the_block() -> None:
    with hide_library("json"), pytest.raises(ImportError):
        __import__("json")
    assert __import__("json") is other_library


def test_library_that_was_not_loaded_is_not_loaded_by_hiding_it() -> None:
    with hide_library("this_library_does_not_exist"):
        pass
    assert "this_library_does_not_exist" not in sys.modules


@pytest.mark.parametrize(("package", "setting"), [("gateway", "GATEWAY_PORT"), ("workers", "WORKER_CONCURRENCY")])
def test_process_loads_no_optional_library(package: str, setting: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", package],
        env=os.environ | {setting: "no number"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"structlog", "nats.aio.client"} <= loaded
    assert not {"aiohttp.client", "rich.console"} & loaded


async def test_url_of_websockets_loads_what_their_transport_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nats.aio.transport.aiohttp", None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        connection = NatsConnection(NatsAccess(f"ws://127.0.0.1:{unused.getsockname()[1]}"), "test")
        with pytest.raises(Unavailable):
            await connection.connect(timeout_s=1.0)
