"""One call of the JetStream API, and its end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from backbone.bus.nats.jetstream import request


class Server:
    """Answers when it is told to, and waits for that as nats-py's client does."""

    is_connected = True

    def __init__(self) -> None:
        self.asked: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def request(self, _subject: str, _payload: bytes, *, timeout: float) -> Any:
        return await asyncio.wait_for(self.asked, timeout)


async def test_a_call_is_cancelled_also_in_the_moment_of_its_answer() -> None:
    """Who asks in a loop could not be ended otherwise, and a gateway that stops would wait for it for ever."""
    server: Any = Server()
    task = asyncio.create_task(request(server, "STREAM.INFO.X"))
    await asyncio.sleep(0)
    server.asked.set_result(SimpleNamespace(data=b"{}"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_that_was_cancelled_may_still_ask() -> None:
    """What it has to clean up at its end."""

    async def work() -> Any:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            server: Any = Server()
            server.asked.set_result(SimpleNamespace(data=b'{"a": 1}'))
            return await request(server, "STREAM.INFO.X")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == {"a": 1}
