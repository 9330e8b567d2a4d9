"""Time-outs that do not count seconds in which this process itself stood still.

A process that gets no CPU, or whose loop is blocked, finds its time-outs expired when it goes on, and answers that came in time
unread. `StallMonitor` measures the delays of the loop while there are waits, and extends every wait by them.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

TICK_INTERVAL_S = 0.1
MIN_STALL_S = 0.02
"""Shorter delays are normal for a loop."""
MAX_EXTENSION_S = 15.0
"""The most by which one wait is extended: no wait is without a bound."""


class StallMonitor:
    """The waits of one event loop. It costs a timer ten times a second while there are any, and nothing else."""

    def __init__(self) -> None:
        self.stalled_s = 0.0
        """Seconds for which the loop stood still during waits."""
        self._waits: set[StallTimeout] = set()
        self._timer: asyncio.TimerHandle | None = None

    def timeout(self, seconds: float) -> StallTimeout:
        """Return a time-out like `asyncio.timeout` that does not count stalls."""
        return StallTimeout(self, seconds)

    def add(self, wait: StallTimeout) -> None:
        """Extend this wait by future stalls."""
        self._waits.add(wait)
        if self._timer is None:
            self._schedule()

    def discard(self, wait: StallTimeout) -> None:
        """Remove a wait that has ended."""
        self._waits.discard(wait)

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        # A plain callback is due before the waits that the same stall delayed, and so extends them in time.
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
    """The context manager of one wait. Raises TimeoutError."""

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
