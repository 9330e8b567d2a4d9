"""Reading ahead of slow callers: bounded, in order and complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from gateway.jobs.api import JobEvent
from gateway.jobs.read_ahead import MAX_BYTES_AHEAD, MAX_EVENTS_AHEAD, event_size, read_ahead
from schemas.job_events import JobEventKind

PIECE = 64 * 1024


class Source:
    """Events that are all there."""

    def __init__(self, count: int, size: int = PIECE) -> None:
        self._count, self._size = count, size
        self.read = 0

    async def events(self) -> AsyncGenerator[JobEvent, None]:
        for number in range(self._count):
            self.read += 1
            yield JobEvent(JobEventKind.CHUNK, f"1-1-{number}", b"x" * self._size)


async def test_a_caller_that_reads_nothing_costs_little_memory() -> None:
    """However large the events are that wait for it; then it gets all of them."""
    source, ids = Source(200), []
    async with aclosing(read_ahead(source.events(), 60, event_size)) as paced:
        ids += [event.id for event in await anext(paced)]
        for _ in range(1000):
            await asyncio.sleep(0)
        assert source.read * PIECE <= MAX_BYTES_AHEAD + 3 * PIECE
        async for ready in paced:
            ids += [event.id for event in ready]
    assert ids == [f"1-1-{number}" for number in range(200)]


async def test_an_event_larger_than_that_comes_all_the_same() -> None:
    """One at a time."""
    source, count = Source(5, 2 * MAX_BYTES_AHEAD), 0
    async with asyncio.timeout(10), aclosing(read_ahead(source.events(), 60, event_size)) as paced:
        async for ready in paced:
            count += len(ready)
    assert count == 5


async def test_small_events_are_bounded_by_their_number() -> None:
    source = Source(10 * MAX_EVENTS_AHEAD, 1)
    async with aclosing(read_ahead(source.events(), 60, event_size)) as paced:
        await anext(paced)
        for _ in range(10_000):
            await asyncio.sleep(0)
        assert source.read <= MAX_EVENTS_AHEAD + 3
