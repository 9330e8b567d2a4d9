"""What InvokeAI says over Socket.IO while it works.

Nothing depends on it: where it cannot be reached, or breaks off, or `python-socketio` is missing, the queue is asked instead, and
only previews and percentages are missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

JSON = dict[str, Any]

PROGRESS = "invocation_progress"
EVENTS = (PROGRESS, "queue_item_status_changed")
CONNECT_TIMEOUT_S = 5


class InvokeAIListener:
    """What was said about one batch: the newest progress, and that a state changed. So nothing piles up."""

    def __init__(self, batch: str) -> None:
        self.live = False
        """Whether it hears anything."""
        self.lost = False
        """Whether it did once, and does no more."""
        self._batch = batch
        self._progress: JSON | None = None
        self._changed = False
        self._stirred = asyncio.Event()

    def hear(self, event: str, data: JSON) -> None:
        if data.get("batch_id") != self._batch:
            return
        if event == PROGRESS:
            self._progress = data
        else:
            self._changed = True
        self._stirred.set()

    def lose(self) -> None:
        """The connection is gone."""
        self.lost = self.lost or self.live
        self.live = False
        self._changed = True
        self._stirred.set()

    async def news(self, seconds: float) -> JSON | None:
        """The newest progress. None: ask the queue, since a state changed, or nothing was heard for `seconds`."""
        try:
            # Not `wait_for`, which before Python 3.12 loses a cancellation that comes together with the news.
            async with asyncio.timeout(seconds):
                await self._stirred.wait()
        except TimeoutError:
            return None
        progress, self._progress = self._progress, None
        if progress is None:
            self._changed = False
        if not self._changed:
            self._stirred.clear()
        return progress


@asynccontextmanager
async def listening(url: str, token: str, batch: str) -> AsyncIterator[InvokeAIListener]:
    """A listener, subscribed before this is entered, so that it misses nothing. Never raises for want of a connection."""
    listener = InvokeAIListener(batch)
    async with AsyncExitStack() as stack:
        try:
            await _subscribe(stack, listener, url, token)
        except Exception:  # whatever the reason: the queue is asked then
            listener.lose()
        yield listener


async def _subscribe(stack: AsyncExitStack, listener: InvokeAIListener, url: str, token: str) -> None:
    import aiohttp
    import socketio

    session = await stack.enter_async_context(aiohttp.ClientSession())
    client = socketio.AsyncClient(reconnection=False, handle_sigint=False, http_session=session)
    for event in EVENTS:
        client.on(event, _handler(listener, event))
    client.on("disconnect", _farewell(listener))
    stack.push_async_callback(client.disconnect)
    parts = urlsplit(url)
    await client.connect(
        f"{parts.scheme}://{parts.netloc}",
        auth={"token": token} if token else None,
        transports=["websocket"],
        socketio_path=f"{parts.path.rstrip('/')}/ws/socket.io",
        wait_timeout=CONNECT_TIMEOUT_S,
    )
    await client.call("subscribe_queue", {"queue_id": "default"}, timeout=CONNECT_TIMEOUT_S)
    listener.live = True


def _handler(listener: InvokeAIListener, event: str) -> Any:
    async def heard(data: JSON) -> None:
        listener.hear(event, data)

    return heard


def _farewell(listener: InvokeAIListener) -> Any:
    async def gone(*_why: Any) -> None:
        listener.lose()

    return gone
