"""Time-outs that tell a server's silence from a process that stood still itself.

A process that gets no CPU, or whose loop is held up, finds its time-outs over when it goes on, and the answers that came
in time unread. `StallMonitor` measures how late the loop is while somebody waits, and gives every wait that much more time.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

TICK_INTERVAL_S = 0.1
MIN_STALL_S = 0.02
"""Less than this is how loops are."""
MAX_EXTENSION_S = 15.0
"""How much more time one wait gets at the most: nothing waits without a bound."""


class StallMonitor:
    """Waits of one event loop. It costs a timer ten times a second while there are any, and nothing else."""

    def __init__(self) -> None:
        self.stalled_s = 0.0
        """Seconds for which the loop stood still, as far as somebody waited meanwhile."""
        self._waits: set[StallTimeout] = set()
        self._timer: asyncio.TimerHandle | None = None

    def timeout(self, seconds: float) -> StallTimeout:
        """Like `asyncio.timeout`; seconds in which the loop stood still do not count."""
        return StallTimeout(self, seconds)

    def add(self, wait: StallTimeout) -> None:
        """Give this wait more time from now on, where it is due."""
        self._waits.add(wait)
        if self._timer is None:
            self._schedule()

    def discard(self, wait: StallTimeout) -> None:
        """The wait is over."""
        self._waits.discard(wait)

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        # A plain callback: it is due before the waits that the same stall has made late, and runs before they end.
        self._timer = loop.call_later(TICK_INTERVAL_S, self._tick, loop.time() + TICK_INTERVAL_S)

    def _tick(self, due: float) -> None:
        self._timer = None
        late = asyncio.get_running_loop().time() - due
        if late > MIN_STALL_S:
            self.stalled_s += late
            for wait in self._waits:
                wait.extend(late)
        if self._waits:
            self._schedule()


class StallTimeout:
    """One `async with`. Raises TimeoutError."""

    __slots__ = ("_extension_left_s", "_stalls", "_timeout")

    def __init__(self, stalls: StallMonitor, seconds: float) -> None:
        self._stalls = stalls
        self._timeout = asyncio.timeout(seconds)
        self._extension_left_s = MAX_EXTENSION_S

    def extend(self, seconds: float) -> None:
        when = self._timeout.when()
        more = min(seconds, self._extension_left_s)
        if when is not None and not self._timeout.expired() and more > 0:
            self._extension_left_s -= more
            self._timeout.reschedule(when + more)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._stalls.add(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stalls.discard(self)
        await self._timeout.__aexit__(kind, error, trace)
