"""Attempts that still run ask for their start grant, all of them by one timer."""

from __future__ import annotations

import asyncio

from tests.virtual_time import run
from workers.start_timer import MIN_INTERVAL_S, START_REQUEST_DELAY_S, StartTimer


def test_each_attempt_is_called_once_after_the_delay() -> None:
    """Attempts that start at different times are called in order, each after the delay, and the timer serves later ones."""

    async def main() -> None:
        loop, timer = asyncio.get_running_loop(), StartTimer()
        added: dict[int, float] = {}
        called: dict[int, float] = {}

        def add(number: int) -> None:
            added[number] = loop.time()
            timer.add(lambda: called.update({number: loop.time()}))

        for number in range(20):
            add(number)
            await asyncio.sleep(START_REQUEST_DELAY_S / 7)
        await asyncio.sleep(1)
        add(20)
        await asyncio.sleep(1)
        assert list(called) == list(range(21))
        for number, at in called.items():
            assert START_REQUEST_DELAY_S <= at - added[number] + 1e-9 <= START_REQUEST_DELAY_S + MIN_INTERVAL_S + 2e-9

    run(main())
