"""Synchronize this process's clock with that of NATS. See `backbone.clock`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from backbone.clock import CLOCK, Clock, now
from schemas.errors import NexusError, Unavailable

log = structlog.get_logger(__name__)

__all__ = ["ClockSync", "now"]

INITIAL_POLLS = 3
POLL_INTERVAL_S = 10.0
MAX_ROUND_TRIP_S = 1.0
"""A slower answer is too inaccurate, and is dropped."""
MAX_OFFSET_S = 1.0
"""Offset of the host's clock above which the log and `/readyz` report it."""


class ClockSync:
    """Polls the server's time, and corrects `clock` by it."""

    def __init__(self, server_time_s: Callable[[], Awaitable[float]], clock: Clock = CLOCK) -> None:
        """`server_time_s` returns the server's time in Unix seconds, or raises Unavailable."""
        self._server_time_s = server_time_s
        self._clock = clock
        self._logged_s = 0.0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Learn the time before the first job comes, and poll it until `close`. The bus has started."""
        for _ in range(INITIAL_POLLS):
            await self.poll()
        self._task = asyncio.create_task(self._poll_forever())

    async def close(self) -> None:
        """Stop to poll. The offset that was learned remains in use."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def check(self) -> None:
        """Raise Unavailable if this host's clock is off by more than `MAX_OFFSET_S`."""
        ahead = self._clock.ahead_s
        if abs(ahead) > MAX_OFFSET_S:
            where = "ahead of" if ahead > 0 else "behind"
            raise Unavailable(
                f"this host's clock is {abs(ahead):.1f} s {where} that of NATS, which times all jobs; synchronize the clock (NTP)"
            )

    async def poll(self) -> None:
        """Read the server's time once."""
        sent = self._clock.steady()
        try:
            server_s = await self._server_time_s()
        except NexusError as error:
            log.debug("clock.unknown", error=error.info.message)
            return
        received = self._clock.steady()
        if received - sent > MAX_ROUND_TRIP_S:
            return
        self._clock.observe(server_s, sent, received)
        ahead = self._clock.ahead_s
        if abs(ahead - self._logged_s) > MAX_OFFSET_S:
            self._logged_s = ahead
            log.warning("clock.offset", ahead_s=round(ahead, 3))

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            try:
                await self.poll()
            except Exception:
                log.exception("clock.poll_crashed")
