"""Fixtures of the adapters' tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import pytest
import uvloop

from tests.backends.doubles.openai import OpenAIDouble
from tests.backends.llama_server import LlamaServer, running_llama


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
    """Workers run on uvloop, whose transports behave a little differently. The tests here run on both loops."""
    if any(name in item.nodeid for name in ("test_openai_llama", "test_shapes")):  # take long enough once
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
