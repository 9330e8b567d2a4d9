"""Share the slots of a gateway's own work among owners: one owner's work never waits for another owner's."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

from gateway.limits.effective import Bound


class _Slots:
    __slots__ = ("used", "waiting")

    def __init__(self) -> None:
        self.used = 0
        self.waiting: deque[asyncio.Future[None]] = deque()


class OwnerSlots:
    """Lets at most so much work of each key and team run at the same time; the rest waits in order of arrival."""

    def __init__(self, total: int, extend_interval_s: float) -> None:
        """`total`: how much runs over all owners. `extend_interval_s`: time between two calls of `extend` for waiting work."""
        self._total = Bound("", total)
        self._interval_s = extend_interval_s
        self._slots: dict[str, _Slots] = {}
        self.waiting: Counter[str] = Counter()
        """How much work of each name waits."""

    @asynccontextmanager
    async def hold(self, bounds: Iterable[Bound], extend: Callable[[], None]) -> AsyncIterator[None]:
        """Wait for a slot of each bound, then for one of all, and hold them within the block."""
        async with AsyncExitStack() as stack:
            for bound in (*bounds, self._total):
                await self._acquire(bound, extend)
                stack.callback(self._release, bound.name)
            yield

    async def _acquire(self, bound: Bound, extend: Callable[[], None]) -> None:
        slots = self._slots.setdefault(bound.name, _Slots())
        if slots.used < bound.most and not slots.waiting:
            slots.used += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        slots.waiting.append(turn)
        self.waiting[bound.name] += 1
        try:
            while not turn.done():
                await asyncio.wait({turn}, timeout=self._interval_s)
                extend()
                if not turn.done() and slots.used < bound.most and slots.waiting[0] is turn:  # the limit was raised
                    slots.waiting.popleft()
                    slots.used += 1
                    return
        except BaseException:
            if turn.done():
                self._release(bound.name)
            else:
                slots.waiting.remove(turn)
            raise
        finally:
            self.waiting[bound.name] -= 1
            if not self.waiting[bound.name]:
                del self.waiting[bound.name]

    def _release(self, name: str) -> None:
        """Give a slot to the work that has waited longest."""
        slots = self._slots[name]
        if slots.waiting:
            slots.waiting.popleft().set_result(None)
        elif slots.used > 1:
            slots.used -= 1
        else:
            del self._slots[name]
