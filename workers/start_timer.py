"""Let attempts that started without a start grant ask for it a moment later, all of them by one timer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

START_REQUEST_DELAY_S = 0.03
"""Most attempts at short work have ended by then, and save two messages in each direction."""
MIN_INTERVAL_S = 0.005


class StartTimer:
    """Calls each attempt's `request_start` START_REQUEST_DELAY_S after its start. An attempt that has ended ignores the call."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()
        self._is_scheduled = False

    def add(self, request_start: Callable[[], None]) -> None:
        """Call `request_start` once, after the delay."""
        loop = asyncio.get_running_loop()
        self._waiting.append((loop.time() + START_REQUEST_DELAY_S, request_start))
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_later(START_REQUEST_DELAY_S, self._call_due, loop)

    def _call_due(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        while self._waiting and self._waiting[0][0] <= now:
            self._waiting.popleft()[1]()
        self._is_scheduled = bool(self._waiting)
        if self._waiting:
            loop.call_later(max(MIN_INTERVAL_S, self._waiting[0][0] - now), self._call_due, loop)
