"""A work queue of the gateways on NATS: a stream with one consumer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime

from backbone.bus.job_log import Retention, WorkItem, WorkQueueFull
from backbone.bus.nats.requests import JetStreamError, RequestInbox, call_api, message_id_headers, store_message
from backbone.bus.nats.stream_configs import ensure_pull_consumer, ensure_work_queue
from backbone.bus.subjects import GATEWAY_GROUP, work_item_subject, work_queue_stream
from schemas.errors import Unavailable

Make = Callable[[float], Awaitable[None]]
Take = Callable[[str, str, Make, int, float], AsyncGenerator[WorkItem, None]]
"""(stream, consumer, function that creates the consumer, max_unacked, ack_wait_s)"""


class NatsWorkQueue:
    """A work queue; see backbone.bus.job_log.WorkQueue. Its stream is created when it is first used, and after each reconnect."""

    def __init__(self, name: str, inbox: RequestInbox, retention: Retention, take: Take) -> None:
        """Configure the queue. `take` consumes from a consumer. Raises ValueError for an invalid name."""
        self.name = name
        self._stream = work_queue_stream(name)
        self._inbox = inbox
        self._retention = retention
        self._take = take
        self._stream_exists = False

    async def create_stream(self) -> None:
        """Create the stream. Raises Unavailable."""
        await ensure_work_queue(self._inbox, self.name, self._retention)
        self._stream_exists = True

    async def put(self, item_id: str, data: bytes) -> None:
        """Publish the item with its id as the message id."""
        subject = work_item_subject(self.name, item_id).encode()
        if not self._stream_exists:
            await self.create_stream()
        try:
            await store_message(
                self._inbox, subject, data, message_id_headers(item_id), max_payload=self._inbox.max_payload
            )
        except JetStreamError as error:
            if error.limit_reached:
                raise WorkQueueFull(f"the work queue '{self.name}' is full") from error
            raise Unavailable(f"the work queue '{self.name}' cannot store an item: {error}") from error

    async def consume(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        """Consume from the one consumer that all gateways share."""
        items = self._take(self._stream, GATEWAY_GROUP, self._ensure_consumer, max_unacked, ack_wait_s)
        async with contextlib.aclosing(items):
            async for item in items:
                yield item

    async def oldest(self) -> int | None:
        """Read it from the stream, which holds what is not acknowledged."""
        if not self._stream_exists:
            await self.create_stream()
        try:
            state = (await call_api(self._inbox, f"STREAM.INFO.{self._stream}"))["state"]
        except JetStreamError as error:
            raise Unavailable(f"the work queue '{self.name}' cannot be read: {error}") from error
        if not state["messages"]:
            return None
        return int(datetime.fromisoformat(state["first_ts"][:19] + "+00:00").timestamp())

    async def _ensure_consumer(self, ack_wait_s: float) -> None:
        await self.create_stream()
        await ensure_pull_consumer(self._inbox, self._stream, GATEWAY_GROUP, ack_wait_s)
