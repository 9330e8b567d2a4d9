"""Consumption of messages from a consumer that all gateways share, by raw pulls on an inbox of its own, one open at a time.

A pulled message does not tell the pull that brought it, and a pull that nobody reads any more swallows messages until it
expires. So there is never more than one open pull, for the free places, and surplus messages are returned at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable

import structlog

from backbone.bus.job_log import WorkItem
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.headers import StatusHeader, parse_ack_subject, parse_status
from backbone.bus.nats.requests import RequestInbox, request_until_answered
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

NANO = 1_000_000_000
PULL_EXPIRY_S = 20.0
LOST_PULL_GRACE_S = 3.0
"""A pull without any reply for this time after its expiry was lost with its server."""
RETRY_DELAY_S = 0.5
"""Between attempts, where a pull ended at once or the consumer could not be created."""
POLL_INTERVAL_S = 1.0
IDLE_HEARTBEAT = 100
EXPIRED = 408


class NatsWorkItem:
    """An item from NATS; see backbone.bus.job_log.WorkItem."""

    __slots__ = ("_ack_subject", "_consumer", "data", "delivery", "id", "stored_at", "until")

    def __init__(self, consumer: PullConsumer, item_id: str, data: bytes, ack_subject: bytes) -> None:
        self._consumer = consumer
        self._ack_subject = ack_subject
        self.id = item_id
        self.data = data
        ack = parse_ack_subject(ack_subject)
        self.delivery = ack.delivery
        self.stored_at = ack.stored_ns // NANO
        self.until = time.monotonic() + consumer.ack_wait_s

    @property
    def _is_owned(self) -> bool:
        return time.monotonic() < self.until

    async def ack(self) -> None:
        """Send an acknowledgement, and wait until NATS confirms it. It also counts after `ack_wait_s`: the work is done."""
        await self._consumer.confirm(self._ack_subject)
        self._consumer.forget(self)

    def nak(self, delay_s: float) -> None:
        """Send a negative acknowledgement. After `ack_wait_s` the item belongs to another gateway already."""
        if self._is_owned:
            nak = b'-NAK {"delay":%d}' % int(delay_s * NANO) if delay_s > 0 else b"-NAK"
            self._consumer.publish(self._ack_subject, nak)
        self.until = 0.0
        self._consumer.forget(self)

    def extend(self) -> None:
        if self._is_owned:
            self.until = time.monotonic() + self._consumer.ack_wait_s
            self._consumer.publish(self._ack_subject, b"+WPI")


class PullConsumer:
    """One gateway's share of one consumer."""

    def __init__(
        self,
        connection: NatsConnection,
        inbox: RequestInbox,
        *,
        stream: str,
        consumer: str,
        make: Callable[[float], Awaitable[None]],
        max_unacked: int,
        ack_wait_s: float,
    ) -> None:
        """Configure the consumer. `make(ack_wait_s)` creates the consumer in NATS, and what it needs."""
        self._connection = connection
        self._inbox = inbox
        self._api = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}".encode()
        self._name = f"{stream}/{consumer}"
        self._make = make
        self._at_once = max_unacked
        self.ack_wait_s = ack_wait_s
        self._pull_inbox = ""
        self._sid: int | None = None
        self._consumer_exists = False
        self._reopen = True
        self._ready: deque[NatsWorkItem] = deque()
        self._unsettled: set[NatsWorkItem] = set()
        self._outstanding = 0
        """Messages that the open pull may still bring."""
        self._pull = 0
        self._pulled_at = 0.0
        self._next_pull_at = 0.0
        self._closed = self._ended = False
        self._wake = asyncio.Event()

    async def items(self) -> AsyncGenerator[WorkItem, None]:
        """Yield items; see backbone.bus.job_log.WorkQueue.consume."""
        try:
            while True:
                if self._closed:
                    raise Unavailable("the connection to NATS is closed")
                self._wake.clear()
                item = self._first_ready()
                if item is not None:
                    yield item
                    continue
                await self._ensure_pull()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_INTERVAL_S):
                        await self._wake.wait()
        finally:
            await self._end()

    def _first_ready(self) -> NatsWorkItem | None:
        """Return the next item. An item that waited here for longer than `ack_wait_s` belongs to another gateway."""
        while self._ready:
            item = self._ready.popleft()
            if time.monotonic() < item.until:
                return item
            self._unsettled.discard(item)
        return None

    async def _ensure_pull(self) -> None:
        """Open a pull if fewer than `max_unacked` items are unsettled."""
        now = time.monotonic()
        if self._outstanding and now > self._pulled_at + PULL_EXPIRY_S + LOST_PULL_GRACE_S:
            self._outstanding = 0
        if not self._connection.connected or now < self._next_pull_at or (self._outstanding and not self._reopen):
            return
        if self._reopen:
            await self._open_inbox()
        if not self._consumer_exists:
            try:
                await self._make(self.ack_wait_s)
            except Unavailable as error:
                log.warning("consumer.setup_failed", consumer=self._name, error=str(error))
                self._next_pull_at = time.monotonic() + RETRY_DELAY_S
                return
            self._consumer_exists = True
        free = self._at_once - self._count_unsettled()
        if free > 0:
            self._send_pull(free)

    async def _open_inbox(self) -> None:
        """Open a new inbox after each reconnect: it keeps out what a cluster still holds for the old one."""
        self._reopen, self._outstanding = False, 0
        if self._sid is not None:
            self._connection.drop_subscription(self._sid)
        self._pull_inbox = self._connection.new_inbox()
        self._sid = await self._connection.subscribe(f"{self._pull_inbox}.*", self._on_message)

    def _send_pull(self, count: int) -> None:
        self._pull += 1
        self._outstanding, self._pulled_at = count, time.monotonic()
        request = b'{"batch":%d,"expires":%d}' % (count, int(PULL_EXPIRY_S * NANO))
        try:
            self._connection.publish(self._api, request, f"{self._pull_inbox}.{self._pull}".encode())
        except Unavailable:
            self._outstanding, self._next_pull_at = 0, self._pulled_at + RETRY_DELAY_S

    def _count_unsettled(self) -> int:
        now = time.monotonic()
        for item in [one for one in self._unsettled if one.until <= now]:
            self._unsettled.discard(item)
        return len(self._unsettled)

    def _on_message(self, subject: bytes, ack_subject: bytes, headers: bytes, data: bytes) -> None:
        if not ack_subject.startswith(b"$JS.ACK."):
            status = parse_status(headers)
            number = int(subject[len(self._pull_inbox) + 1 :])
            if status is not None and status.code != IDLE_HEARTBEAT and number == self._pull:
                self._on_end(status)
            return
        if self._outstanding:
            self._outstanding -= 1
        if self._ended or self._count_unsettled() >= self._at_once:
            self.publish(ack_subject, b"-NAK")
            return
        item_id = subject.rpartition(b".")[2].decode()
        item = NatsWorkItem(self, item_id, data, ack_subject)
        self._unsettled.add(item)
        self._ready.append(item)
        self._wake.set()

    def _on_end(self, status: StatusHeader) -> None:
        """Handle the end of the pull. Unless it has just expired, NATS may have lost the consumer."""
        now = time.monotonic()
        self._outstanding = 0
        if status.code != EXPIRED:
            self._consumer_exists = False
        if status.code != EXPIRED or now < self._pulled_at + RETRY_DELAY_S:
            self._next_pull_at = now + RETRY_DELAY_S
            asyncio.get_running_loop().call_later(RETRY_DELAY_S, self._wake.set)
        self._wake.set()

    def forget(self, item: NatsWorkItem) -> None:
        """Free the place of a settled item."""
        self._unsettled.discard(item)
        self._wake.set()

    def publish(self, ack_subject: bytes, ack: bytes) -> None:
        """Send an acknowledgement; best effort."""
        with contextlib.suppress(Unavailable):
            self._connection.publish(ack_subject, ack)

    async def confirm(self, ack_subject: bytes) -> None:
        """Acknowledge until NATS confirms it. Raises Unavailable, soon where a crash made NATS forget the delivery: it does not
        answer then, and delivers the item again.
        """
        await request_until_answered(self._inbox, ack_subject, b"+ACK", max_timeouts=1)

    def resume(self) -> None:
        """Open a new pull after a reconnect, and create the consumer again if the server has lost it."""
        self._reopen, self._consumer_exists = True, False
        self._wake.set()

    def close(self) -> None:
        """End `items` with Unavailable."""
        self._closed = True
        self._wake.set()

    async def _end(self) -> None:
        """Return the items that were not yielded, and those on their way."""
        self._ended = True
        while self._ready:
            self._ready.popleft().nak(0)
        if self._sid is not None:
            sid, self._sid = self._sid, None
            await self._connection.unsubscribe(sid)
