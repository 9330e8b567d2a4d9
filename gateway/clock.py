"""Keep this process's clock at that of NATS. See `backbone.clock`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from backbone.clock import CLOCK, Clock, now
from schemas.errors import NexusError, Unavailable

log = structlog.get_logger(__name__)

__all__ = ["ClockSync", "now"]

FIRST_LOOKS = 3
LOOK_S = 10.0
MAX_ROUND_TRIP_S = 1.0
"""A slower answer says too little about the time."""
OFF_S = 1.0
"""A host whose clock is off by more than this is named in the log and at `/readyz`."""


class ClockSync:
    """Asks for the time now and then."""

    def __init__(self, ask: Callable[[], Awaitable[float]], clock: Clock = CLOCK) -> None:
        """`ask` returns the server's time, in Unix seconds; it raises Unavailable."""
        self._ask = ask
        self._clock = clock
        self._told_s = 0.0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Know the time before the first job comes. What depends on NATS is up."""
        for _ in range(FIRST_LOOKS):
            await self.look()
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Stop asking; what was learned stays."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def check(self) -> None:
        """Raise Unavailable where this host's clock is off."""
        ahead = self._clock.ahead_s
        if abs(ahead) > OFF_S:
            where = "ahead of" if ahead > 0 else "behind"
            raise Unavailable(
                f"this host's clock is {abs(ahead):.1f} s {where} that of NATS; jobs are timed by NATS's. Set the clock (NTP)"
            )

    async def look(self) -> None:
        """Ask once."""
        sent = self._clock.steady()
        try:
            server_s = await self._ask()
        except NexusError as error:
            log.debug("clock.unknown", error=error.info.message)
            return
        received = self._clock.steady()
        if received - sent > MAX_ROUND_TRIP_S:
            return
        self._clock.observe(server_s, sent, received)
        ahead = self._clock.ahead_s
        if abs(ahead - self._told_s) > OFF_S:
            self._told_s = ahead
            log.warning("clock.offset", ahead_s=round(ahead, 3))

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except Exception:
                log.exception("clock.poll_crashed")
