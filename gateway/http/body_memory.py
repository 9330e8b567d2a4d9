"""Share the memory for request bodies among all callers, so that no slow caller blocks another.

Received bytes are charged to the arrival pool, whatever length the caller announced. A large JSON body is also charged to the check
pool while it is validated. Guarantees:

- An owner gets at most as much of a pool as it leaves free, so that another owner's body always fits, however many keys it has.
- A body that waits longer than `MAX_WAIT_S` in total is refused with 503.
- While a body waits, bodies that arrive more slowly than `MIN_RATE` end with 408 until there is enough memory.
- If bodies wait for each other to end, the newest bodies of the owners that hold most are refused with 503.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from schemas.errors import BodyMemoryFull, RequestTimeout

MAX_WAIT_S = 10.0
SWEEP_INTERVAL_S = 0.25
"""Between two checks of all bodies' rates, while one of them waits."""
RATE_WINDOW_S = 1.0
"""Time over which a body's rate is measured."""
MIN_RATE = 64 * 1024
"""Bytes per second below which a body counts as slow while others wait."""
MIN_EVICTED_BYTES = 4096
"""Bodies that hold less are not evicted: it would free too little."""


class BodyMemory:
    """Holds both pools."""

    def __init__(self, total: int, largest: int = 0) -> None:
        """`total`: bytes of both pools. `largest`: bytes of the largest body, which always fits into the empty arrival pool."""
        self.arrivals = ArrivalPool(max(total // 2, largest))
        self.checks = CheckPool(max(1, total // 2))

    def share(self, owner: str) -> BodyShare:
        """Open the share of one body of an owner; a context manager."""
        return BodyShare(self, owner)

    @property
    def used(self) -> int:
        """Bytes that are charged now."""
        return self.arrivals.total - self.arrivals.free + self.checks.total - self.checks.free


class _ArrivalMark(NamedTuple):
    """The bytes of a body that had arrived at a time."""

    clock: float
    """Seconds, without the time in which the body waited for memory."""
    size: int

    def is_slow(self, now: _ArrivalMark, least_s: float) -> bool:
        """Return whether the rate since this mark was below `MIN_RATE`, over at least `least_s`."""
        since = now.clock - self.clock
        return since >= least_s and now.size - self.size < MIN_RATE * since


class BodyShare:
    """The memory of one body."""

    __slots__ = (
        "_checked",
        "_is_quiet",
        "_last_mark",
        "_memory",
        "_received",
        "_timer",
        "_window_start",
        "evicted",
        "owner",
        "reserved",
        "waited_s",
        "waiter",
    )  # fmt: skip

    def __init__(self, memory: BodyMemory, owner: str) -> None:
        self._memory = memory
        self.owner = owner
        self.reserved = 0
        """Bytes of the arrival pool."""
        self.waited_s = 0.0
        """Seconds that the body waited for memory; they do not count against the caller."""
        self.evicted = False
        self._received = 0
        """Bytes that were charged to the share in total."""
        self._window_start: _ArrivalMark | None = None
        self._last_mark: _ArrivalMark | None = None
        self._is_quiet = False
        self.waiter: _WaitingBody | None = None
        self._checked = 0
        self._timer: asyncio.Timeout | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.reserved:
            self._memory.arrivals.release(self, self.reserved)
        if self._checked:
            self._memory.checks.release(self, self._checked)
            self._checked = 0

    async def add(self, size: int) -> None:
        """Charge received bytes, and wait until they fit. Raises BodyMemoryFull."""
        if size and not self._memory.arrivals.try_charge(self, size):
            await self._memory.arrivals.wait(self, size)

    def remove(self, size: int) -> None:
        """Return bytes that are no longer in memory."""
        if size:
            self._memory.arrivals.release(self, size)

    async def check(self, size: int) -> None:
        """Charge a complete body for its validation, until the share is closed. Raises BodyMemoryFull."""
        checks = self._memory.checks
        size = min(size, checks.largest)
        if not checks.try_charge(self, size):
            await checks.wait(self, size)
        self._checked += size

    @contextlib.contextmanager
    def reading(self, timer: asyncio.Timeout) -> Iterator[None]:
        """Mark the body as waiting for its caller within the block; an eviction expires `timer`."""
        self._timer = timer
        try:
            yield
        finally:
            self._timer = None

    @property
    def is_reading(self) -> bool:
        """Whether the body waits for its caller now."""
        return self._timer is not None

    @property
    def is_stalled(self) -> bool:
        """Whether the body waits for its caller, which sent little since the last check."""
        return self._timer is not None and self._is_quiet

    def check_rate(self, now: float) -> bool:
        """Update the measured rate. Returns whether the caller has sent less than `MIN_RATE` over `RATE_WINDOW_S` while the body waited for it.

        The time in which the body waited for memory does not count.
        """
        clock = now - self.waited_s
        is_reading = self._timer is not None
        last_mark, self._last_mark = self._last_mark, _ArrivalMark(clock, self._received)
        self._is_quiet = (
            is_reading and last_mark is not None and last_mark.is_slow(self._last_mark, SWEEP_INTERVAL_S / 2)
        )
        if self._window_start is None or not is_reading:
            self._window_start = self._last_mark
            return False
        if clock - self._window_start.clock < RATE_WINDOW_S:
            return False
        window_start, self._window_start = self._window_start, self._last_mark
        return window_start.is_slow(self._last_mark, RATE_WINDOW_S)

    def charge(self, size: int) -> None:
        """Count bytes of the arrival pool."""
        self.reserved += size
        self._received += size

    def evict(self) -> None:
        """End a body that waits for its caller."""
        self.evicted = True
        if self._timer is not None:
            self._timer.reschedule(asyncio.get_running_loop().time())

    def timed_out(self) -> RequestTimeout | None:
        """Return the error of an evicted body."""
        if not self.evicted:
            return None
        return RequestTimeout(
            f"The request's body arrived at less than {MIN_RATE} bytes per second while other requests waited for "
            "its memory. Send the request again.",
            should_retry=True,
            retry_after_s=1.0,
        )


@dataclass(slots=True, eq=False)
class _WaitingBody:
    share: BodyShare
    size: int
    turn: asyncio.Future[None]


class _MemoryPool:
    """Memory that owners share. Waiting bodies of an owner are served in order; the owner that holds least comes first."""

    def __init__(self, total: int) -> None:
        self.total = self.free = total
        self.reserved: dict[str, int] = {}
        self._queues: dict[str, deque[_WaitingBody]] = {}

    def try_charge(self, share: BodyShare, size: int) -> bool:
        """Charge at once. Returns False if the bytes do not fit."""
        if share.owner in self._queues or not self._fits(share, size):
            return False
        self._charge(share, size)
        return True

    async def wait(self, share: BodyShare, size: int) -> None:
        """Charge as soon as the bytes fit. Raises BodyMemoryFull."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        waiter = share.waiter = _WaitingBody(share, size, loop.create_future())
        self._queues.setdefault(share.owner, deque()).append(waiter)
        try:
            async with asyncio.timeout_at(began + MAX_WAIT_S - share.waited_s):
                self._serve_waiters()
                await waiter.turn
        except BaseException as error:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self.release(share, size)
            self._forget(waiter)
            if isinstance(error, TimeoutError):
                raise BodyMemoryFull from None
            raise
        finally:
            share.waiter = None
            share.waited_s += loop.time() - began

    def release(self, share: BodyShare, size: int) -> None:
        """Return charged bytes to the pool, and serve waiting bodies."""
        self.free += size
        left = self.reserved[share.owner] - size
        if left:
            self.reserved[share.owner] = left
        else:
            del self.reserved[share.owner]
        if self._queues:
            self._serve_waiters()

    def _charge(self, share: BodyShare, size: int) -> None:
        self.free -= size
        self.reserved[share.owner] = self.reserved.get(share.owner, 0) + size

    def _fits(self, share: BodyShare, size: int) -> bool:
        """Return whether the owner would hold at most what it leaves free: half alone, one part in n + 1 of n busy owners."""
        return self.reserved.get(share.owner, 0) + size <= self.free - size

    def _serve_waiters(self) -> None:
        served = True
        while served and self._queues:
            served = False
            for owner in sorted(self._queues, key=lambda one: self.reserved.get(one, 0)):
                waiter = self._queues[owner][0]
                if self._fits(waiter.share, waiter.size):
                    self._grant(waiter)
                    served = True
                    break
                if waiter.size > self.free:
                    break  # smaller bodies must not overtake it forever

    def _grant(self, waiter: _WaitingBody) -> None:
        self._forget(waiter)
        waiter.share.waiter = None
        if not waiter.turn.done():
            self._charge(waiter.share, waiter.size)
            waiter.turn.set_result(None)

    def _forget(self, waiter: _WaitingBody) -> None:
        queue = self._queues.get(waiter.share.owner)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._queues[waiter.share.owner]


class CheckPool(_MemoryPool):
    """Memory for complete bodies. Each is released without its caller's help, so that a body may wait for all its bytes at once."""

    @property
    def largest(self) -> int:
        """Most bytes that one body takes; two such bodies fit."""
        return self.total // 2

    def _fits(self, share: BodyShare, size: int) -> bool:
        return size <= self.free if share.owner not in self.reserved else super()._fits(share, size)


class ArrivalPool(_MemoryPool):
    """Memory for arriving bodies, which take it piece by piece and depend on their callers."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self._shares: dict[BodyShare, None] = {}
        """Shares that hold bytes, oldest first."""
        self._favored: BodyShare | None = None
        """The body that may exceed its owner's part, so that bodies complete one after another when memory is short."""
        self._reserve = total // 8
        """Bytes that the favored body leaves to other owners."""
        self._sweeping = False
        self._blocked = 0
        """Successive sweeps at which the favored body waited."""

    def _charge(self, share: BodyShare, size: int) -> None:
        super()._charge(share, size)
        share.charge(size)
        self._shares[share] = None

    def release(self, share: BodyShare, size: int) -> None:
        share.reserved -= size
        if not share.reserved:
            self._shares.pop(share, None)
            if self._favored is share:
                self._favored = None
        super().release(share, size)

    def _serve_waiters(self) -> None:
        super()._serve_waiters()
        if not self._queues:
            return
        if self._favored is None or self._favored.is_stalled:
            self._favored = next((one for one in self._shares if one.waiter is not None), None)
        if self._favored is not None and (favored := self._favored.waiter) is not None and self._has_room(favored):
            self._grant(favored)
            self._serve_waiters()
            return
        if all(share.waiter is not None for share in self._shares):
            self._shed(1)
        if self._queues and not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(SWEEP_INTERVAL_S, self._sweep)

    def _has_room(self, favored: _WaitingBody) -> bool:
        alone = favored.share.reserved == self.total - self.free
        return favored.size <= self.free - (0 if alone else self._reserve)

    def _shed(self, wanted: int) -> None:
        """Refuse waiting bodies, the newest of the owners that hold most first, until `wanted` bytes will be free."""
        newest_first = [one for one in reversed(self._shares) if one.waiter is not None and one is not self._favored]
        for share in sorted(newest_first, key=lambda one: -self.reserved[one.owner]):
            waiter = share.waiter
            if wanted <= 0:
                return
            if waiter is not None and not waiter.turn.done():
                wanted -= share.reserved
                self._forget(waiter)
                share.waiter = None
                waiter.turn.set_exception(BodyMemoryFull())

    def _sweep(self) -> None:
        """Evict slow bodies, of the owners that hold most first, until half of the pool is free; then serve waiting bodies."""
        self._sweeping = False
        if not self._queues:
            return
        now = asyncio.get_running_loop().time()
        slow = [share for share in list(self._shares) if share.check_rate(now) and share.reserved >= MIN_EVICTED_BYTES]
        wanted = self.total // 2 - self.free
        for share in sorted(slow, key=lambda one: (-self.reserved[one.owner], -one.reserved)):
            if wanted <= 0 and share is not self._favored:
                continue
            share.evict()
            wanted -= share.reserved
        self._blocked = self._blocked + 1 if self._favored is not None and self._favored.waiter is not None else 0
        if self._blocked * SWEEP_INTERVAL_S >= RATE_WINDOW_S:
            self._blocked = 0
            self._shed(self.total // 4)
        self._serve_waiters()
