"""Doing several things at once, and getting their results in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def in_order(
    things: AsyncIterator[T], work: Callable[[T], Awaitable[R]], at_once: int
) -> AsyncGenerator[R, None]:
    """What `work` makes of each thing, at most `at_once` ahead of whoever takes it. Raises what `things` and `work` raise."""
    under_way: deque[asyncio.Future[R]] = deque()
    try:
        async for thing in things:
            under_way.append(asyncio.ensure_future(work(thing)))
            if len(under_way) >= at_once:
                yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        for future in under_way:
            future.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await future
