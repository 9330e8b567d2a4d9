"""One call of the JetStream API, and its end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from backbone.bus.nats.requests import ReplyMessage, call_api


class Inbox:
    """An inbox whose one reply the test gives."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[list[ReplyMessage] | None] = asyncio.get_running_loop().create_future()

    def request(self, _subject: bytes, _payload: bytes) -> asyncio.Future[list[ReplyMessage] | None]:
        return self.reply


async def test_a_call_is_cancelled_also_in_the_moment_of_its_answer() -> None:
    """Who asks in a loop could not be ended otherwise, and a gateway that stops would wait for it forever."""
    inbox: Any = Inbox()
    task = asyncio.create_task(call_api(inbox, "STREAM.INFO.X"))
    await asyncio.sleep(0)
    inbox.reply.set_result([ReplyMessage(b"", b"{}")])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_that_was_cancelled_may_still_ask() -> None:
    """What it has to clean up at its end."""

    async def work() -> Any:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            inbox: Any = Inbox()
            inbox.reply.set_result([ReplyMessage(b"", b'{"a": 1}')])
            return await call_api(inbox, "STREAM.INFO.X")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == {"a": 1}
