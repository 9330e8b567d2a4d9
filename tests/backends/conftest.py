"""Fixtures of the adapters' tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import pytest
import uvloop

from tests.backends.doubles.openai import OpenAIDouble
from tests.backends.llama_server import LlamaServer, running_llama

BOTH_LOOPS = (
    "test_http_client.py",
    "test_content_coding.py",
    "test_multipart.py",
    "test_comfyui.py",
    "test_command.py",
    "test_invokeai.py",
    "test_openai_double.py",
    "test_service.py",
)


@pytest.fixture
async def double() -> AsyncIterator[OpenAIDouble]:
    async with OpenAIDouble() as server:
        yield server


@pytest.fixture(scope="session")
def llama() -> Iterator[LlamaServer]:
    """Shared: never stop it."""
    with running_llama() as server:
        yield server.wait()


@pytest.fixture
async def own_llama() -> AsyncIterator[Callable[..., LlamaServer]]:
    """Starts servers of the test's own, to kill and start again."""
    with ExitStack() as stack:
        yield lambda port=0: stack.enter_context(running_llama(port))
        await asyncio.sleep(0)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run tests of transports, subprocesses and websockets on both loops: workers run on uvloop, and on asyncio where uvloop is missing."""
    if any(item.path.name == name for name in BOTH_LOOPS):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}
