"""Move events from NATS into the ledger's database.

All gateways share one queue; each message is delivered to one of them at a time, until it is acknowledged after the commit.
A message that was committed but not acknowledged is delivered again, and its rows fold.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import aclosing

import structlog

from backbone.bus.job_log import WorkItem, WorkQueue
from backbone.ledger.usage_ledger import UsageLedger
from backbone.ledger.usage_query import PricedEvent
from backbone.retry import Backoff
from gateway import clock
from gateway.metrics import GatewayMetrics
from gateway.usage.events import decode_events
from gateway.usage.prices import PriceFile
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

MAX_UNACKED = 64
MAX_BYTES = 1024 * 1024
"""Size from which on a transaction takes no further message."""
ACK_WAIT_S = 15.0
"""After this time the messages of a gateway that was killed go to another one."""
RENEW_INTERVAL_S = 4.0
BACKOFF = Backoff(0.5, factor=2.0, max_s=15.0)
PRUNE_INTERVAL_S = 3600.0
PRUNE_COUNT = 10_000
PRUNE_PAUSE_S = 1.0


class LedgerEventWriter(ABC):
    """Writes the events that arrive, and deletes old ones. It retries for as long as the database is away."""

    def __init__(self, queue: WorkQueue, metrics: GatewayMetrics, *, keep_s: float) -> None:
        self._queue = queue
        self._metrics = metrics
        self._keep_s = keep_s
        self._arrived: asyncio.Queue[WorkItem] = asyncio.Queue(MAX_UNACKED)
        self._tasks: list[asyncio.Task[None]] = []
        self._oldest: int | None = None

    @abstractmethod
    async def write(self, items: list[WorkItem]) -> int:
        """Write the events of messages, those that are written already excepted, and return their number. Raises Unavailable."""

    @abstractmethod
    def count_written(self, written: int) -> None:
        """Count events that were written."""

    @abstractmethod
    async def delete_old(self, before_ms: int, limit: int) -> int:
        """Delete at most `limit` events before `before_ms`, and return their number. Raises Unavailable."""

    async def start(self) -> None:
        """Start to write. The queue can be used; the database need not."""
        self._tasks = [asyncio.create_task(work) for work in (self._receive(), self._write(), self._prune())]

    async def close(self) -> None:
        """Stop. Another gateway goes on."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def lag_s(self) -> float:
        """Return the age of the oldest message that could not be written; 0: there is none."""
        return 0.0 if self._oldest is None else max(0.0, clock.now() - self._oldest)

    async def _receive(self) -> None:
        async with aclosing(self._queue.consume(max_unacked=MAX_UNACKED, ack_wait_s=ACK_WAIT_S)) as items:
            async for item in items:
                await self._arrived.put(item)

    async def _write(self) -> None:
        failures = 0
        while True:
            items = [await self._arrived.get()]
            size = len(items[0].data)
            while size < MAX_BYTES and not self._arrived.empty():
                items.append(self._arrived.get_nowait())
                size += len(items[-1].data)
            try:
                written = await self._store(items)
            except Exception as error:
                failures += 1
                self._fail(items, error, BACKOFF.delay_s(failures))
                await asyncio.sleep(BACKOFF.delay_s(failures))
                continue
            if failures:
                log.info("ledger.available")
            failures, self._oldest = 0, None
            self._metrics.ledger_up.set(1)
            self.count_written(written)
            await asyncio.gather(*(_acknowledge(item) for item in items))

    async def _store(self, items: list[WorkItem]) -> int:
        """Write the events of messages, and keep the messages meanwhile. Return the number of new rows."""
        storing = asyncio.create_task(self.write(items))
        try:
            while not (await asyncio.wait({storing}, timeout=RENEW_INTERVAL_S))[0]:
                for item in items:
                    item.extend()
            return storing.result()
        finally:
            storing.cancel()

    def _fail(self, items: list[WorkItem], error: Exception, delay_s: float) -> None:
        if isinstance(error, Unavailable):
            log.warning("ledger.unavailable", error=error.info.message, messages=len(items))
        else:
            log.error("ledger.defect", exc_info=error)
        self._metrics.ledger_up.set(0)
        oldest = min(item.stored_at for item in items)
        self._oldest = oldest if self._oldest is None else min(oldest, self._oldest)
        for item in items:
            item.nak(delay_s)

    async def _prune(self) -> None:
        """Delete the events that have become too old, a few at a time."""
        while True:
            await asyncio.sleep(PRUNE_INTERVAL_S)
            with contextlib.suppress(Unavailable):
                before_ms = int(1000 * (clock.now() - self._keep_s))
                while await self.delete_old(before_ms, PRUNE_COUNT) == PRUNE_COUNT:
                    await asyncio.sleep(PRUNE_PAUSE_S)


class LedgerWriter(LedgerEventWriter):
    """Writes the usage events into the ledger, with their costs."""

    def __init__(
        self, queue: WorkQueue, ledger: UsageLedger, prices: PriceFile, metrics: GatewayMetrics, *, keep_s: float
    ) -> None:
        super().__init__(queue, metrics, keep_s=keep_s)
        self._ledger = ledger
        self._prices = prices

    async def close(self) -> None:
        """Stop, and close the database."""
        await super().close()
        await self._ledger.close()

    async def write(self, items: list[WorkItem]) -> int:
        return await self._ledger.store(self._decode(items))

    def count_written(self, written: int) -> None:
        self._metrics.ledger_rows.inc(written)

    async def delete_old(self, before_ms: int, limit: int) -> int:
        return await self._ledger.delete_runs(before_ms, limit)

    def _decode(self, items: list[WorkItem]) -> Iterator[PricedEvent]:
        """Yield the events of messages, in the database's thread: the event loop has no time for thousands of them."""
        self._prices.refresh()
        for item in items:
            for event in decode_events(item.data):
                if isinstance(event, ValueError):
                    log.error("ledger.event_malformed", message=item.id, error=str(event))
                    self._metrics.usage_dropped.inc()
                else:
                    yield PricedEvent(event, *self._prices.price(event))


async def _acknowledge(item: WorkItem) -> None:
    """Remove a message. One that NATS does not confirm comes back, and folds."""
    with contextlib.suppress(Unavailable):
        await item.ack()
