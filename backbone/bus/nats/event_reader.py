"""Follows the events of a job: first those that are stored, then those that NATS republishes as it stores them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import NamedTuple

from backbone.bus.job_log import StoredEvent
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.requests import ReplyMessage
from backbone.bus.nats.stream_reader import StreamReader
from backbone.bus.subjects import EVENTS, STORED_EVENTS, STORED_OUTCOMES
from schemas.errors import Unavailable

MAX_BUFFERED_EVENTS = 1024
MAX_BUFFERED_BYTES = 4 * 1024 * 1024
"""The most that waits in memory for a slow reader; it reads the rest from the stream."""


class _RepublishedEvent(NamedTuple):
    event: StoredEvent
    previous: int
    """The sequence of this job's event before it."""


class EventReader:
    """One reader of one job's events."""

    def __init__(self, connection: NatsConnection, reader: StreamReader, job: str, after: int) -> None:
        self._connection = connection
        self._reader = reader
        self._job = job
        self._last_yielded = after
        """The sequence of the last event that was yielded."""
        self._last_republished = 0
        """The sequence of the last republished event."""
        self._read_up_to = 0
        """Events up to this sequence that are missing in the stream do not exist any more."""
        self._republished: deque[_RepublishedEvent] = deque()
        self._republished_bytes = 0
        self._must_read_stream = False
        """The stream must be read (again)."""
        self._exhausted = False
        """The last batch was the end of the stream."""
        self._closed = False
        self._wake = asyncio.Event()

    async def events(self) -> AsyncGenerator[StoredEvent | None, None]:
        """Yield events; see backbone.bus.job_log.JobLog.follow_events."""
        sids: list[int] = []
        try:
            sids.append(await self._connection.subscribe(f"{STORED_EVENTS}.{self._job}", self._on_republished))
            sids.append(await self._connection.subscribe(f"{STORED_OUTCOMES}.{self._job}", self._on_ended))
            while True:
                # Events that are republished from now on may be missing in the next batch.
                last_republished, self._must_read_stream = self._last_republished, False
                while found := await self._stored():
                    for event in found:
                        if self._must_read_stream:
                            break
                        self._last_yielded = event.seq
                        yield event
                if not self._must_read_stream:
                    self._read_up_to = last_republished
                idle_pending = True
                while not self._must_read_stream:
                    republished = self._next_republished()
                    if republished is not None:
                        yield republished
                    elif idle_pending and not self._must_read_stream:
                        idle_pending = False
                        yield None
                    elif not self._must_read_stream:
                        await self._wake.wait()
        finally:
            for sid in sids:
                self._connection.drop_subscription(sid)

    async def _stored(self) -> list[StoredEvent]:
        """Return the next stored events; empty: there are no more, or the stream must be read again."""
        if self._must_read_stream or self._exhausted:
            self._exhausted = False
            return []
        self._require_open()
        found, left = await self._reader.batch(self._last_yielded + 1, f"{EVENTS}.{self._job}")
        self._exhausted = left == 0 and bool(found)
        return [StoredEvent(message.seq, message.data, message.stored_at) for message in found]

    def _next_republished(self) -> StoredEvent | None:
        """Return the next republished event if it follows the last yielded one; else the stream must be read, or there is none."""
        self._require_open()
        while self._republished:
            event, previous = self._republished[0]
            if event.seq > self._last_yielded and previous > max(self._last_yielded, self._read_up_to):
                self._must_read_stream = True
                return None
            self._republished.popleft()
            self._republished_bytes -= len(event.data)
            if event.seq > self._last_yielded:
                self._last_yielded = event.seq
                return event
        self._wake.clear()
        return None

    def _require_open(self) -> None:
        if self._closed:
            raise Unavailable("the connection to NATS is closed")

    def _on_republished(self, _subject: bytes, _reply: bytes, headers: bytes, data: bytes) -> None:
        republished = ReplyMessage(headers, data)
        seq = int(republished.header(b"Nats-Sequence") or 0)
        if len(self._republished) >= MAX_BUFFERED_EVENTS or self._republished_bytes + len(data) > MAX_BUFFERED_BYTES:
            self._republished.clear()
            self._republished_bytes = 0
        self._republished.append(
            _RepublishedEvent(StoredEvent(seq, data), int(republished.header(b"Nats-Last-Sequence") or 0))
        )
        self._republished_bytes += len(data)
        self._last_republished = seq
        self._wake.set()

    def _on_ended(self, _subject: bytes, _reply: bytes, _headers: bytes, _data: bytes) -> None:
        self._must_read_stream = True
        self._wake.set()

    def resume(self, stream_was_lost: bool) -> None:
        """Read the stream again after a reconnect. `stream_was_lost`: its sequences begin at 1 again."""
        if stream_was_lost:
            self._republished.clear()
            self._republished_bytes = self._last_yielded = self._last_republished = self._read_up_to = 0
        self._must_read_stream = True
        self._wake.set()

    def close(self) -> None:
        """End `events` with Unavailable."""
        self._closed = True
        self._wake.set()
