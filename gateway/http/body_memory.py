"""Memory for request bodies, shared by all callers so that no caller's slowness holds up another.

Bytes that have arrived are charged to the arrival pool, whatever the caller announced. A large JSON body takes its share of the
check pool while it is parsed. Guarantees:

- A key gets at most as much of a pool as it leaves free, so that another key's body always finds room.
- A body that waits longer than `MAX_WAIT_S` in all is refused with 503.
- While a body waits, bodies that arrive more slowly than `MIN_RATE` end with 408 until there is room.
- Where bodies wait for each other's end, the newest of the keys that hold most are refused with 503.
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
"""Between two looks at the bodies, while one of them waits."""
OBSERVED_S = 1.0
"""Seconds over which a body's rate is taken."""
MIN_RATE = 64 * 1024
"""Bytes a second below which a body counts as slow while others wait."""
MIN_EVICTED = 4096
"""Ending a body that holds less than this many bytes would gain nothing."""


class BodyMemory:
    """Both pools. `largest`: bytes of the largest body, which always fits into the empty arrival pool."""

    def __init__(self, total: int, largest: int = 0) -> None:
        self.arrivals = ArrivalPool(max(total // 2, largest))
        self.checks = CheckPool(max(1, total // 2))

    def share(self, owner: str) -> BodyShare:
        """Begin the share of one body of this key. Close it, with `with`."""
        return BodyShare(self, owner)

    @property
    def used(self) -> int:
        """Bytes that are charged now."""
        return self.arrivals.total - self.arrivals.free + self.checks.total - self.checks.free


class _Mark(NamedTuple):
    """How much of a body had come at a time."""

    clock: float
    """Seconds, without those in which the body waited for memory."""
    size: int

    def is_slow(self, now: _Mark, least_s: float) -> bool:
        """Whether less than `MIN_RATE` came since, over at least this long."""
        since = now.clock - self.clock
        return since >= least_s and now.size - self.size < MIN_RATE * since


class BodyShare:
    """What one body holds."""

    __slots__ = (
        "_checked", "_is_quiet", "_marked", "_memory", "_received", "_seen", "_timer", "evicted", "held", "owner", "waited_s",
        "waiter",
    )  # fmt: skip

    def __init__(self, memory: BodyMemory, owner: str) -> None:
        self._memory = memory
        self.owner = owner
        self.held = 0
        """Bytes of the arrival pool."""
        self.waited_s = 0.0
        """Seconds that the body waited for memory; they do not count against the caller."""
        self.evicted = False
        self._received = 0
        """Bytes that were ever charged to it."""
        self._marked: _Mark | None = None
        self._seen: _Mark | None = None
        self._is_quiet = False
        self.waiter: _Waiter | None = None
        self._checked = 0
        self._timer: asyncio.Timeout | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.held:
            self._memory.arrivals.give(self, self.held)
        if self._checked:
            self._memory.checks.give(self, self._checked)
            self._checked = 0

    async def add(self, size: int) -> None:
        """Charge bytes that arrived. Raises BodyMemoryFull."""
        if size and not self._memory.arrivals.take(self, size):
            await self._memory.arrivals.wait(self, size)

    def remove(self, size: int) -> None:
        """Give back bytes that are in memory no longer."""
        if size:
            self._memory.arrivals.give(self, size)

    async def check(self, size: int) -> None:
        """Charge a body that is complete and will be parsed, until the share is closed. Raises BodyMemoryFull."""
        checks = self._memory.checks
        size = min(size, checks.largest)
        if not checks.take(self, size):
            await checks.wait(self, size)
        self._checked += size

    @contextlib.contextmanager
    def reading(self, timer: asyncio.Timeout) -> Iterator[None]:
        """Mark the body as waiting for its caller inside; eviction lets `timer` run out."""
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
        """Whether the body waits for its caller, who sent little since the last look."""
        return self._timer is not None and self._is_quiet

    def look(self, now: float) -> bool:
        """Return whether the body waits for its caller, who has sent less than `MIN_RATE` over `OBSERVED_S`.

        Seconds in which the body waited for memory do not count.
        """
        clock = now - self.waited_s
        is_reading = self._timer is not None
        seen, self._seen = self._seen, _Mark(clock, self._received)
        self._is_quiet = is_reading and seen is not None and seen.is_slow(self._seen, SWEEP_INTERVAL_S / 2)
        if self._marked is None or not is_reading:
            self._marked = self._seen
            return False
        if clock - self._marked.clock < OBSERVED_S:
            return False
        marked, self._marked = self._marked, self._seen
        return marked.is_slow(self._seen, OBSERVED_S)

    def charge(self, size: int) -> None:
        """Count bytes of the arrival pool."""
        self.held += size
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
            f"the request's body arrived at less than {MIN_RATE} bytes a second while other requests waited for the "
            "memory that it held; send it again",
            should_retry=True,
            retry_after_s=1.0,
        )


@dataclass(slots=True, eq=False)
class _Waiter:
    share: BodyShare
    size: int
    turn: asyncio.Future[None]


class _Pool:
    """Bytes that keys share. Waiting bodies are served in order within a key; the key that holds least comes first."""

    def __init__(self, total: int) -> None:
        self.total = self.free = total
        self.held: dict[str, int] = {}
        self._queues: dict[str, deque[_Waiter]] = {}

    def take(self, share: BodyShare, size: int) -> bool:
        """Charge at once, or return False."""
        if share.owner in self._queues or not self._fits(share, size):
            return False
        self._charge(share, size)
        return True

    async def wait(self, share: BodyShare, size: int) -> None:
        """Charge when there is room. Raises BodyMemoryFull."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        waiter = share.waiter = _Waiter(share, size, loop.create_future())
        self._queues.setdefault(share.owner, deque()).append(waiter)
        try:
            async with asyncio.timeout_at(began + MAX_WAIT_S - share.waited_s):
                self._serve()
                await waiter.turn
        except BaseException as error:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self.give(share, size)
            self._forget(waiter)
            if isinstance(error, TimeoutError):
                raise BodyMemoryFull from None
            raise
        finally:
            share.waiter = None
            share.waited_s += loop.time() - began

    def give(self, share: BodyShare, size: int) -> None:
        """Take a charge back."""
        self.free += size
        left = self.held[share.owner] - size
        if left:
            self.held[share.owner] = left
        else:
            del self.held[share.owner]
        if self._queues:
            self._serve()

    def _charge(self, share: BodyShare, size: int) -> None:
        self.free -= size
        self.held[share.owner] = self.held.get(share.owner, 0) + size

    def _fits(self, share: BodyShare, size: int) -> bool:
        """A key may hold what it leaves free: alone half, of n busy keys one part in n + 1."""
        return self.held.get(share.owner, 0) + size <= self.free - size

    def _serve(self) -> None:
        served = True
        while served and self._queues:
            served = False
            for owner in sorted(self._queues, key=lambda one: self.held.get(one, 0)):
                waiter = self._queues[owner][0]
                if self._fits(waiter.share, waiter.size):
                    self._grant(waiter)
                    served = True
                    break
                if waiter.size > self.free:
                    break  # smaller bodies must not pass it again and again

    def _grant(self, waiter: _Waiter) -> None:
        self._forget(waiter)
        waiter.share.waiter = None
        if not waiter.turn.done():
            self._charge(waiter.share, waiter.size)
            waiter.turn.set_result(None)

    def _forget(self, waiter: _Waiter) -> None:
        queue = self._queues.get(waiter.share.owner)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._queues[waiter.share.owner]


class CheckPool(_Pool):
    """For bodies that are complete: each ends by itself, so that waiting for all of it at once is safe."""

    @property
    def largest(self) -> int:
        """Bytes that one body takes at most: two fit."""
        return self.total // 2

    def _fits(self, share: BodyShare, size: int) -> bool:
        return size <= self.free if share.owner not in self.held else super()._fits(share, size)


class ArrivalPool(_Pool):
    """For bodies that arrive: they take memory piece by piece, and depend on their callers."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self._shares: dict[BodyShare, None] = {}
        """Those that hold something, oldest first."""
        self._favored: BodyShare | None = None
        """The one body that may take more than its key's part, so that bodies end one after another when memory is short."""
        self._reserve = total // 8
        """Bytes that the favored body leaves to keys that hold nothing."""
        self._sweeping = False
        self._blocked = 0
        """Looks in a row at which the favored body waited."""

    def _charge(self, share: BodyShare, size: int) -> None:
        super()._charge(share, size)
        share.charge(size)
        self._shares[share] = None

    def give(self, share: BodyShare, size: int) -> None:
        share.held -= size
        if not share.held:
            self._shares.pop(share, None)
            if self._favored is share:
                self._favored = None
        super().give(share, size)

    def _serve(self) -> None:
        super()._serve()
        if not self._queues:
            return
        if self._favored is None or self._favored.is_stalled:
            self._favored = next((one for one in self._shares if one.waiter is not None), None)
        if self._favored is not None and (favored := self._favored.waiter) is not None and self._has_room(favored):
            self._grant(favored)
            self._serve()
            return
        if all(share.waiter is not None for share in self._shares):
            self._shed(1)
        if self._queues and not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(SWEEP_INTERVAL_S, self._sweep)

    def _has_room(self, favored: _Waiter) -> bool:
        alone = favored.share.held == self.total - self.free
        return favored.size <= self.free - (0 if alone else self._reserve)

    def _shed(self, wanted: int) -> None:
        """Refuse bodies that wait for each other, the newest of the keys that hold most, until `wanted` bytes will be free."""
        newest_first = [one for one in reversed(self._shares) if one.waiter is not None and one is not self._favored]
        for share in sorted(newest_first, key=lambda one: -self.held[one.owner]):
            waiter = share.waiter
            if wanted <= 0:
                return
            if waiter is not None and not waiter.turn.done():
                wanted -= share.held
                self._forget(waiter)
                share.waiter = None
                waiter.turn.set_exception(BodyMemoryFull())

    def _sweep(self) -> None:
        """Serve again, as time has passed; end the slow bodies of the keys that hold most, until half of the pool is free."""
        self._sweeping = False
        if not self._queues:
            return
        now = asyncio.get_running_loop().time()
        slow = [share for share in list(self._shares) if share.look(now) and share.held >= MIN_EVICTED]
        wanted = self.total // 2 - self.free
        for share in sorted(slow, key=lambda one: (-self.held[one.owner], -one.held)):
            if wanted <= 0 and share is not self._favored:
                continue
            share.evict()
            wanted -= share.held
        self._blocked = self._blocked + 1 if self._favored is not None and self._favored.waiter is not None else 0
        if self._blocked * SWEEP_INTERVAL_S >= OBSERVED_S:
            self._blocked = 0
            self._shed(self.total // 4)
        self._serve()
