"""Fetch shares of limits from the store: one exchange for each share at a time, for which requests wait together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

from schemas.errors import NexusError


class Share(Protocol):
    """One gateway's share of a limit. Amounts are all of one type."""

    available: Any
    """What is left of the share."""
    wanting: Any
    """What requests wait for."""
    check_at: float
    """The time until which requests are refused without an exchange, by `monotonic`."""
    lease: asyncio.Task[None] | None
    """The exchange in progress."""


S = TypeVar("S", bound=Share)


class ShareLeases(Generic[S]):
    """Runs the exchanges of shares."""

    def __init__(self, exchange: Callable[[S, Any], Awaitable[None]], refusal: Callable[[S, Any], NexusError]) -> None:
        """`exchange` gives back or takes what a share needs at least; `refusal` returns the error of a share that does not suffice."""
        self._exchange = exchange
        self._refusal = refusal

    def begin(self, share: S, need: float) -> asyncio.Task[None]:
        """Begin an exchange. None may be in progress."""
        share.lease = task = asyncio.create_task(self._run(share, need))
        return task

    async def fill(self, share: S, need: float) -> None:
        """Get a share of at least `need`, by the exchange in progress or a new one. Raises the refusal."""
        if share.lease is None and monotonic() < share.check_at:
            raise self._refusal(share, need)
        lease = share.lease or self.begin(share, need)
        share.wanting += need
        try:
            await asyncio.shield(lease)
        finally:
            share.wanting -= need
        if share.available < need and monotonic() < share.check_at:
            raise self._refusal(share, need)

    async def _run(self, share: S, need: float) -> None:
        try:
            await self._exchange(share, need)
        finally:
            share.lease = None
