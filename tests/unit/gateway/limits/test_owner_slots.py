"""Slots that owners share."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from gateway.limits.effective import Bound
from gateway.limits.owner_slots import OwnerSlots


class Works:
    """Work that runs until it is told to end."""

    def __init__(self, slots: OwnerSlots) -> None:
        self.slots = slots
        self.running: list[str] = []
        self.extended = 0
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def _extend(self) -> None:
        self.extended += 1

    async def start(self, name: str, *bounds: Bound) -> None:
        async def work() -> None:
            async with self.slots.hold(bounds, self._extend):
                self.running.append(name)
                try:
                    await self._ends[name].wait()
                finally:
                    self.running.remove(name)

        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(work())
        await self.settled()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self.settled()

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        with suppress(asyncio.CancelledError):
            await self.tasks[name]
        await self.settled()

    async def settled(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


async def test_an_owner_waits_for_itself_alone() -> None:
    """In the order of arrival; what is cancelled while it waits, or runs, makes room."""
    works, evil, good = Works(OwnerSlots(10, 60.0)), Bound("evil", 2), Bound("good", 2)
    for name in "abcde":
        await works.start(name, evil)
    await works.start("x", good)
    assert works.running == ["a", "b", "x"]
    assert works.slots.waiting == {"evil": 3}
    await works.cancel("c")
    await works.end("b")
    assert works.running == ["a", "x", "d"]
    await works.cancel("a")
    assert works.running == ["x", "d", "e"]
    for name in "dex":
        await works.end(name)
    assert not works.slots.waiting
    assert not works.slots._slots


async def test_both_of_a_key_and_a_team_must_be_free() -> None:
    works, team = Works(OwnerSlots(10, 60.0)), Bound("team:t", 2)
    await works.start("a", Bound("key:1", 1), team)
    await works.start("b", Bound("key:1", 1), team)
    await works.start("c", Bound("key:2", 9), team)
    await works.start("d", Bound("key:2", 9), team)
    assert works.running == ["a", "c"]
    await works.end("c")
    assert works.running == ["a", "d"]


@pytest.mark.parametrize("raised", [True, False])
async def test_work_that_waits_is_extended(raised: bool) -> None:
    """And runs as soon as its limit is raised."""
    works = Works(OwnerSlots(10, 0.001))
    await works.start("a", Bound("t", 1))
    await works.start("b", Bound("t", 2 if raised else 1))
    async with asyncio.timeout(10):
        while works.extended < 2 and "b" not in works.running:
            await asyncio.sleep(0.001)
    assert ("b" in works.running) is raised
    await works.cancel("a")
    await works.cancel("b")
