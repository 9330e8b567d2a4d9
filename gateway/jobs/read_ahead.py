"""Reads events ahead of a slow caller, within bounds, and marks pauses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from gateway.jobs.api import JobEvent

T = TypeVar("T")

MAX_EVENTS_AHEAD = 256
"""The maximum number of events read before the caller takes them."""
MAX_BYTES_AHEAD = 256 * 1024
"""The maximum size of these events, exceeded by at most one event. A slow reader costs at most twice as much memory."""
REPORT_STEP_BYTES = 16 * 1024
"""The minimum change of the buffered size that is reported to the connection."""


def event_size(event: JobEvent) -> int:
    """Return the size of an event in bytes."""
    return len(event.data)


def no_report(_size: int) -> None:
    """Ignore the buffered size."""


class _BufferedBytes:
    """Counts the bytes that are read ahead and those that the consumer currently holds."""

    def __init__(self, report_buffered: Callable[[int], None]) -> None:
        self._report_buffered = report_buffered
        self._reported = 0
        self.ahead = self.consumed = 0

    def report(self) -> None:
        """Report the buffered size if it has changed enough."""
        total = self.ahead + self.consumed
        if abs(total - self._reported) >= REPORT_STEP_BYTES:
            self._reported = total
            self._report_buffered(total)

    def close(self) -> None:
        if self._reported:
            self._report_buffered(0)


async def read_ahead(
    events: AsyncGenerator[T, None],
    pause_s: float,
    size: Callable[[T], int] = lambda _: 0,
    report_buffered: Callable[[int], None] = no_report,
) -> AsyncGenerator[list[T], None]:
    """Yield the available events as a list, or an empty list if none arrives for `pause_s`. Closes `events`.

    Args:
        events: The events.
        pause_s: The pause in seconds after which an empty list is yielded.
        size: Returns the size of an event in bytes.
        report_buffered: Receives the number of buffered bytes; see `gateway.http.asgi.HttpExchange.report_buffered`.
    """
    ready: asyncio.Queue[T] = asyncio.Queue(MAX_EVENTS_AHEAD)
    buffered, has_room = _BufferedBytes(report_buffered), asyncio.Event()

    async def pump() -> None:
        try:
            async for event in events:
                buffered.ahead += size(event)
                buffered.report()
                await ready.put(event)
                while buffered.ahead > MAX_BYTES_AHEAD:
                    has_room.clear()
                    await has_room.wait()
        finally:
            await events.aclose()

    def take(some: list[T]) -> list[T]:
        buffered.consumed = sum(map(size, some))
        buffered.ahead -= buffered.consumed
        buffered.report()
        has_room.set()
        return some

    reading = asyncio.create_task(pump())
    next_event: asyncio.Future[T] | None = None
    try:
        while True:
            buffered.consumed = 0
            if not ready.empty():
                yield take([ready.get_nowait() for _ in range(ready.qsize())])
                continue
            buffered.report()
            if reading.done():
                reading.result()
                return
            next_event = asyncio.ensure_future(ready.get())
            await asyncio.wait((next_event, reading), timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
            if next_event.done():
                yield take([next_event.result()])
            else:
                next_event.cancel()
                if not reading.done():
                    yield []
    finally:
        reading.cancel()
        if next_event is not None:
            next_event.cancel()
        buffered.close()
        await asyncio.gather(reading, return_exceptions=True)
