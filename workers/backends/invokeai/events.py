"""InvokeAI's Socket.IO events.

Nothing depends on them: where Socket.IO cannot be reached, or breaks off, or `python-socketio` is missing, the queue is polled instead, and only
previews and percentages are missing.
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
    """The events of one batch, reduced to the newest progress and to whether a state changed."""

    def __init__(self, batch: str) -> None:
        self.connected = False
        """Whether events arrive."""
        self.lost = False
        """Whether the connection broke after events had arrived."""
        self._batch = batch
        self._progress: JSON | None = None
        self._changed = False
        self._notified = asyncio.Event()

    def receive(self, event: str, data: JSON) -> None:
        if data.get("batch_id") != self._batch:
            return
        if event == PROGRESS:
            self._progress = data
        else:
            self._changed = True
        self._notified.set()

    def disconnect(self) -> None:
        """Note that the connection is broken."""
        self.lost = self.lost or self.connected
        self.connected = False
        self._changed = True
        self._notified.set()

    async def next_progress(self, seconds: float) -> JSON | None:
        """Return the newest progress. None: poll the queue, since a state changed, or no event came for `seconds`."""
        try:
            # Not `wait_for`, which before Python 3.12 loses a cancellation that comes together with the event.
            async with asyncio.timeout(seconds):
                await self._notified.wait()
        except TimeoutError:
            return None
        progress, self._progress = self._progress, None
        if progress is None:
            self._changed = False
        if not self._changed:
            self._notified.clear()
        return progress


@asynccontextmanager
async def open_listener(url: str, token: str, batch: str) -> AsyncIterator[InvokeAIListener]:
    """Open a listener that is subscribed before any work begins. A missing connection raises nothing."""
    listener = InvokeAIListener(batch)
    async with AsyncExitStack() as stack:
        try:
            await _subscribe(stack, listener, url, token)
        except Exception:  # whatever the reason: the queue is polled then
            listener.disconnect()
        yield listener


async def _subscribe(stack: AsyncExitStack, listener: InvokeAIListener, url: str, token: str) -> None:
    import aiohttp
    import socketio

    session = await stack.enter_async_context(aiohttp.ClientSession())
    client = socketio.AsyncClient(reconnection=False, handle_sigint=False, http_session=session)
    for event in EVENTS:
        client.on(event, _event_handler(listener, event))
    client.on("disconnect", _disconnect_handler(listener))
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
    listener.connected = True


def _event_handler(listener: InvokeAIListener, event: str) -> Any:
    async def receive_event(data: JSON) -> None:
        listener.receive(event, data)

    return receive_event


def _disconnect_handler(listener: InvokeAIListener) -> Any:
    async def disconnected(*_why: Any) -> None:
        listener.disconnect()

    return disconnected
