"""Following the events of a job: what is stored, then what NATS repeats as it is stored."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import NamedTuple

from backbone.bus.job_log import StoredEvent
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.request_inbox import ReplyMessage
from backbone.bus.nats.stream_reader import StreamReader
from backbone.bus.subjects import EVENTS, STORED_EVENTS, STORED_OUTCOMES
from schemas.errors import Unavailable

MAX_TOLD = 1024
MAX_TOLD_BYTES = 4 * 1024 * 1024
"""What waits for a slow reader; the rest it gets from what is stored."""


class _Told(NamedTuple):
    event: StoredEvent
    previous: int
    """The sequence of the event of this job before it."""


class EventReader:
    """One reader of one job's events."""

    def __init__(self, wire: NatsConnection, reader: StreamReader, job: str, after: int) -> None:
        self._wire = wire
        self._reader = reader
        self._job = job
        self._last = after
        """The last event given out."""
        self._known = 0
        """The last one told of."""
        self._covered = 0
        """What was told of up to here, and is not in the stream, is gone."""
        self._told: deque[_Told] = deque()
        self._told_bytes = 0
        self._look = False
        """What is stored must be read (again)."""
        self._exhausted = False
        """The batch that was read was the last one."""
        self._closed = False
        self._wake = asyncio.Event()

    async def events(self) -> AsyncGenerator[StoredEvent | None, None]:
        """See backbone.bus.job_log.JobLog.events."""
        sids: list[int] = []
        try:
            sids.append(await self._wire.subscribe(f"{STORED_EVENTS}.{self._job}", self._on_told))
            sids.append(await self._wire.subscribe(f"{STORED_OUTCOMES}.{self._job}", self._on_ended))
            while True:
                # What is told from now on may be missing in what is read.
                known, self._look = self._known, False
                while found := await self._stored():
                    for event in found:
                        if self._look:
                            break
                        self._last = event.seq
                        yield event
                if not self._look:
                    self._covered = known
                owed = True
                while not self._look:
                    told = self._next_told()
                    if told is not None:
                        yield told
                    elif owed and not self._look:
                        owed = False
                        yield None
                    elif not self._look:
                        await self._wake.wait()
        finally:
            for sid in sids:
                self._wire.drop_subscription(sid)

    async def _stored(self) -> list[StoredEvent]:
        """The next ones of what is stored; none: there are no more, or something happened meanwhile."""
        if self._look or self._exhausted:
            self._exhausted = False
            return []
        self._require_open()
        found, left = await self._reader.batch(self._last + 1, f"{EVENTS}.{self._job}")
        self._exhausted = left == 0 and bool(found)
        return [StoredEvent(message.seq, message.data, message.stored_at) for message in found]

    def _next_told(self) -> StoredEvent | None:
        """The next one, if it is the next one; else `_look` is set, or there is nothing."""
        self._require_open()
        while self._told:
            event, previous = self._told[0]
            if event.seq > self._last and previous > max(self._last, self._covered):
                self._look = True
                return None
            self._told.popleft()
            self._told_bytes -= len(event.data)
            if event.seq > self._last:
                self._last = event.seq
                return event
        self._wake.clear()
        return None

    def _require_open(self) -> None:
        if self._closed:
            raise Unavailable("the connection to NATS is closed")

    def _on_told(self, _subject: bytes, _reply: bytes, headers: bytes, data: bytes) -> None:
        told = ReplyMessage(headers, data)
        seq = int(told.header(b"Nats-Sequence") or 0)
        if len(self._told) >= MAX_TOLD or self._told_bytes + len(data) > MAX_TOLD_BYTES:
            self._told.clear()
            self._told_bytes = 0
        self._told.append(_Told(StoredEvent(seq, data), int(told.header(b"Nats-Last-Sequence") or 0)))
        self._told_bytes += len(data)
        self._known = seq
        self._wake.set()

    def _on_ended(self, _subject: bytes, _reply: bytes, _headers: bytes, _data: bytes) -> None:
        self._look = True
        self._wake.set()

    def resume(self, anew: bool) -> None:
        """After a reconnect: something may have been missed; `anew`, the stream was lost and counts from 1 again."""
        if anew:
            self._told.clear()
            self._told_bytes = self._last = self._known = self._covered = 0
        self._look = True
        self._wake.set()

    def close(self) -> None:
        """There is nothing to follow any more: the reader gets Unavailable."""
        self._closed = True
        self._wake.set()
