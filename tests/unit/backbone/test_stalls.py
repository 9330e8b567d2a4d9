"""A wait does not end for the time in which this process itself stood still."""

from __future__ import annotations

import asyncio
import time

import pytest

from backbone.stalls import StallMonitor


async def test_a_stall_does_not_count() -> None:
    """An answer that came meanwhile is taken, however long the loop was held up."""
    stalls, answer = StallMonitor(), asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(time.sleep, 0.5)
    asyncio.get_running_loop().call_later(0.55, answer.set_result, "here")
    async with stalls.timeout(0.3):
        assert await answer == "here"
    assert stalls.stalled_s > 0.3


async def test_silence_ends_a_wait() -> None:
    """Without a stall it is a plain time-out."""
    stalls, loop = StallMonitor(), asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TimeoutError):
        async with stalls.timeout(0.3):
            await loop.create_future()
    assert 0.3 <= loop.time() - began < 0.3 + stalls.stalled_s + 0.2


async def test_what_is_raised_inside_is_passed_on() -> None:
    """Errors, and a cancellation from outside, which is no time-out."""
    stalls = StallMonitor()
    with pytest.raises(ValueError, match="mine"):
        async with stalls.timeout(1.0):
            raise ValueError("mine")

    async def wait() -> None:
        async with stalls.timeout(60.0):
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
