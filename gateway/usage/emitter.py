"""Carry events from the requests to NATS, without a request's waiting for it.

An event is written into the journal, which costs a few microseconds. Ten times a second, and at once for durable jobs, what is
in the journal is stored on NATS as one message. The events of a message that NATS does not confirm stay in the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

import structlog

from backbone.bus.job_log import WorkQueue, WorkQueueFull
from backbone.retry import Backoff
from gateway.usage.events import HEADER, Values, encode_event
from gateway.usage.journal import SUFFIX, EventBatch, Segment, UsageJournal, read_orphan
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

FLUSH_INTERVAL_S = 0.1
CONFIRMATION_TIMEOUT_S = 5.0
ORPHAN_INTERVAL_S = 60.0
CLOSE_TIMEOUT_S = 3.0
BACKOFF = Backoff(0.25, factor=2.0, max_s=5.0)


class UsageEmitter:
    """Makes messages of events. Owned by one event loop."""

    KIND = "usage"
    """The kind of events, for the log."""
    HEADER = HEADER
    SUFFIX = SUFFIX

    def __init__(self, queue: WorkQueue, folder: Path | None, count_dropped: Callable[[int], None]) -> None:
        """`folder`: of the journal; `count_dropped` is called with the number of events that were lost. Raises OSError."""
        self._queue = queue
        self._journal = UsageJournal(folder, self.SUFFIX)
        self._count_dropped = count_dropped
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._sealed: deque[Segment] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._pending = False
        self._is_dropping = False
        """The loss of events was logged, and nothing was stored since."""

    async def start(self) -> None:
        """Begin to store events, also those that dead processes have left. The queue can be used."""
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._adopt())]

    async def close(self) -> None:
        """Store what is there, as far as NATS answers. The rest stays in the journal's folder."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        with contextlib.suppress(TimeoutError, Unavailable):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._flush()
        self._journal.close()
        for segment in self._sealed:
            segment.close()

    def emit(self, values: Values) -> None:
        """Write an event down. Never raises: an event that cannot be written down is counted."""
        try:
            line = encode_event(values)
            if not self._journal.append(line) and not self._append_to_next(line):
                self._drop("the journal is full")
                return
        except Exception as error:
            self._drop(str(error))
            return
        if not self._pending:
            self._pending = True
            self._wake.set()

    async def store(self, values: Values) -> None:
        """Write an event down, and return once NATS has stored it, or cannot because the stream is full.

        Raises Unavailable when NATS does not confirm it in time; calling again folds.
        """
        self.emit(values)
        stored = asyncio.get_running_loop().create_future()
        self._waiters.append(stored)
        self._urgent.set()
        try:
            async with asyncio.timeout(CONFIRMATION_TIMEOUT_S):
                await stored
        except TimeoutError:
            raise Unavailable("NATS did not store the usage of this job in time.") from None

    def _append_to_next(self, line: bytes) -> bool:
        filled = self._journal.rotate()
        if filled is None:
            return False
        self._sealed.append(filled)
        self._urgent.set()
        return self._journal.append(line)

    def _drop(self, reason: str) -> None:
        self._count_dropped(1)
        if not self._is_dropping:
            self._is_dropping = True
            log.error("journal.event_dropped", kind=self.KIND, reason=reason)

    async def _run(self) -> None:
        failures = 0
        while True:
            await self._wait()
            waiters, self._waiters = self._waiters, []
            try:
                await self._flush()
            except Exception as error:
                failures += 1
                log.warning("journal.not_sent", kind=self.KIND, error=str(error), segments=len(self._sealed))
                if isinstance(error, WorkQueueFull):  # jobs go on; the journal holds the events
                    _settle(waiters)
                else:
                    self._waiters = [*waiters, *self._waiters]
                self._pending = True
                self._wake.set()
                await asyncio.sleep(BACKOFF.delay_s(failures))
                continue
            failures = 0
            _settle(waiters)

    async def _wait(self) -> None:
        """Return when there are events to store: after a moment, in which others join them, unless one is urgent."""
        urgent = asyncio.create_task(self._urgent.wait())
        woken = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait({urgent, woken}, return_when=asyncio.FIRST_COMPLETED)
            if not urgent.done():
                await asyncio.wait({urgent}, timeout=FLUSH_INTERVAL_S)
        finally:
            urgent.cancel()
            woken.cancel()
        self._pending = False
        self._wake.clear()
        self._urgent.clear()

    async def _flush(self) -> None:
        """Store everything that was written down before the call. Raises Unavailable."""
        sealed = self._seal()
        while self._sealed:
            await self._put(self._sealed[0].batch())
            self._journal.release(self._sealed.popleft())
            sealed = sealed or self._seal()
        self._is_dropping = False

    def _seal(self) -> bool:
        """Set the events that were written down aside. False: the journal has no other segment to go on with. Raises OSError."""
        if self._journal.has_events:
            filled = self._journal.rotate()
            if filled is None:
                return False
            self._sealed.append(filled)
        return True

    async def _put(self, batch: EventBatch) -> None:
        await self._queue.put(batch.id, self.HEADER + batch.lines)

    async def _adopt(self) -> None:
        """Store the events that processes which were killed have left in the journal's folder."""
        while True:
            for path in self._journal.orphans():
                try:
                    batch = read_orphan(path)
                    if batch is not None:
                        await self._put(batch)
                        log.info("journal.adopted", kind=self.KIND, file=path.name, bytes=len(batch.lines))
                    path.unlink()
                except Unavailable:
                    break  # the next round comes back to it
                except OSError as error:
                    log.warning("journal.unreadable", kind=self.KIND, file=path.name, error=str(error))
            await asyncio.sleep(ORPHAN_INTERVAL_S)


def _settle(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
