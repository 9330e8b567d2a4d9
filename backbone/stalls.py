"""Time-outs that do not count seconds in which this process itself stood still.

A process that gets no CPU, or whose loop is blocked, finds its time-outs expired when it goes on, and answers that came in time
unread. `StallMonitor` measures the delays of the loop while there are waits, and extends every wait by them. One timer serves all
waits, so that a wait costs two changes of a dictionary, and ends up to `TICK_INTERVAL_S` late.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

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
        self._waits: dict[StallTimeout, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def timeout(self, seconds: float) -> StallTimeout:
        """Return a time-out like `asyncio.timeout` that does not count stalls."""
        return StallTimeout(self, seconds)

    def add(self, wait: StallTimeout) -> None:
        """End this wait at its deadline, and extend it by future stalls."""
        self._waits[wait] = None
        if self._timer is None:
            self._schedule()

    def discard(self, wait: StallTimeout) -> None:
        """Remove a wait that has ended."""
        self._waits.pop(wait, None)

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(TICK_INTERVAL_S, self._tick, loop.time() + TICK_INTERVAL_S)

    def _tick(self, due: float) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        late = now - due if now - due > MIN_STALL_S else 0.0
        self.stalled_s += late
        for wait in list(self._waits):
            wait.check(now, late)
        if self._waits:
            self._schedule()


class StallTimeout:
    """The context manager of one wait. Raises TimeoutError."""

    __slots__ = ("_cancel_requests", "_deadline", "_expired", "_extension_left_s", "_seconds", "_stalls", "_task")

    def __init__(self, stalls: StallMonitor, seconds: float) -> None:
        self._stalls = stalls
        self._seconds = seconds
        self._extension_left_s = MAX_EXTENSION_S
        self._expired = False

    def check(self, now: float, late: float) -> None:
        """Extend the wait by `late` seconds, and cancel its task if the deadline has passed."""
        extension = min(late, self._extension_left_s)
        self._extension_left_s -= extension
        self._deadline += extension
        if now >= self._deadline:
            self._expired = True
            self._stalls.discard(self)
            self._task.cancel()

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a time-out needs a task; await it within one")
        self._task: asyncio.Task[Any] = task
        self._cancel_requests = task.cancelling()
        self._deadline = asyncio.get_running_loop().time() + self._seconds
        self._stalls.add(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._expired:
            self._stalls.discard(self)
        elif self._task.uncancel() <= self._cancel_requests and kind is asyncio.CancelledError:
            raise TimeoutError from error
