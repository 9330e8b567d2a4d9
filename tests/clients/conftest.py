"""Fixtures of the clients' tests: one cluster for all of them, with a real model behind it where there is one.

| fixture | what |
|---|---|
| `cluster` | gateway, echo workers (see `MODELS`), a small queue; its log holds no traceback at the end |
| `impatient_url` | a second gateway, which waits half a second for a first token and one for a body |
| `keyless_url` | a third one, with no key configured |
| `smollm2` | the name of a model that a real llama.cpp server serves |
| `double` | a scripted OpenAI-compatible server behind the model `double` |
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from cli.embedded.binaries import BinaryMissing
from cli.embedded.llama_server import find_model
from cli.embedded.managed_process import ManagedProcess
from tests.backends.doubles.openai import OpenAIDouble
from tests.cluster import ROOT, Cluster, free_port

ODD = "a.b *c>/d"
TAGGED = "org/name:tag"
UNICODE = "modèle-日本"
MODELS = ("echo", ODD, TAGGED, UNICODE)
QUEUE = 4
"""Jobs that may wait for one model."""


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Shared: stop nothing in it."""
    cluster = Cluster(tmp_path_factory.mktemp("clients"), MAX_QUEUED_PER_MODEL=str(QUEUE))
    try:
        await cluster.__aenter__()
    except BinaryMissing as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    try:
        await cluster.start_gateway()
        await cluster.start_worker(WORKER_MODELS=",".join(MODELS))
        yield cluster
    finally:
        await cluster.__aexit__(None, None, None)
    for gateway in cluster.gateways:
        lines = gateway.log_file.read_text().splitlines()
        assert not [line[:3000] for line in lines if "Traceback" in line or '"level":"error"' in line]


async def _another_gateway(cluster: Cluster, **settings: str) -> str:
    await cluster.start_gateway(**settings)
    return cluster.urls[-1]


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def impatient_url(cluster: Cluster) -> str:
    return await _another_gateway(cluster, BODY_TIMEOUT_S="1", FIRST_TOKEN_TIMEOUT_S="0.5")


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def keyless_url(cluster: Cluster) -> str:
    return await _another_gateway(cluster, GATEWAY_BEARER_TOKEN="")


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def smollm2(cluster: Cluster) -> AsyncIterator[str]:
    model = find_model()
    if model is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("the local-models extra is not installed")
    url = f"http://127.0.0.1:{free_port()}"

    async def ready() -> bool:
        try:
            return (await cluster.http.get(url + "/health")).status_code == 200
        except httpx.HTTPError:
            return False

    command: list[str | Path] = [
        sys.executable,
        "-m",
        "cli.embedded.llama_server",
        "--model",
        model,
        "--port",
        url.rpartition(":")[2],
    ]
    command += ["--alias", "smollm2", "--ctx", "4096", "--parallel", "2"]
    server = ManagedProcess(
        "llama", command, log_file=cluster.folder / "llama.log", cwd=ROOT, ready=ready, ready_timeout_s=60
    )
    await server.start()
    try:
        await cluster.start_worker("openai", WORKER_BACKEND_URL=url)
        yield "smollm2"
    finally:
        await server.stop()


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def double(cluster: Cluster) -> AsyncIterator[OpenAIDouble]:
    async with OpenAIDouble() as server:
        await cluster.start_worker("openai", WORKER_BACKEND_URL=server.url)
        yield server
