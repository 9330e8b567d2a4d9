"""Stores the events of an attempt, in order and over outages, without a task or a future for each."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import NamedTuple

from backbone.bus.nats.connection import NatsConnection
from backbone.bus.subjects import EVENTS, require_token
from schemas.errors import RequestTooLarge, Unavailable

MAX_UNCONFIRMED_EVENTS = 1000
MAX_UNCONFIRMED_BYTES = 4 * 1024 * 1024
RESEND_AFTER_S = 5.0
"""All unconfirmed events are sent again when NATS has confirmed none for this time."""
STORED_PREFIX = b'{"stream":'
"""A confirmation begins with it; a refusal begins with the error."""


class _Unconfirmed(NamedTuple):
    number: int
    frame: bytes


class NatsEventWriter:
    """Stores events; see backbone.bus.job_log.EventWriter.

    Each event is published with its own reply subject, where JetStream confirms it. If one was not confirmed, all unconfirmed
    events are sent again, in their order and before new ones: only events that were on their way when NATS refused one can be
    stored before it.
    """

    def __init__(self, connection: NatsConnection, job: str, address: bytes) -> None:
        self._connection = connection
        self._subject = f"{EVENTS}.{require_token(job)}".encode()
        self._address = address
        self._unconfirmed: deque[_Unconfirmed] = deque()
        self._confirmed: set[int] = set()
        """Confirmed events after one that is not confirmed."""
        self._next = 0
        self._bytes = 0
        self._round = 0
        """The number of times that all events were sent again."""
        self._must_resend = False
        self._last_confirmed_at = 0.0
        self._flush_waiters: list[asyncio.Future[None]] = []
        self._lost = False
        self.closed = False

    def append(self, frame: bytes) -> None:
        """Publish the event at once, or with the next round. Raises RequestTooLarge."""
        if self.closed:
            self._lost = True
            return
        if len(frame) > self._connection.client.max_payload > 0:
            raise RequestTooLarge(f"an event of {len(frame)} bytes is larger than the limit of NATS")
        if not self._unconfirmed:
            self._last_confirmed_at = time.monotonic()
        one = _Unconfirmed(self._next, frame)
        self._next += 1
        self._unconfirmed.append(one)
        self._bytes += len(frame)
        if not self._must_resend:
            self._send(one)

    def _send(self, one: _Unconfirmed) -> None:
        if not self._connection.connected:
            self._must_resend = True
            return
        try:
            self._connection.publish(self._subject, one.frame, b"%b.%d.%d" % (self._address, self._round, one.number))
        except Unavailable:
            self._must_resend = True

    def confirmed(self, round_: int, index: int, data: bytes) -> None:
        """Handle a confirmation. The event is stored, whichever round it was sent in."""
        if not data.startswith(STORED_PREFIX):
            self._must_resend = self._must_resend or round_ == self._round
            return
        unconfirmed = self._unconfirmed
        if not unconfirmed or index < unconfirmed[0].number:
            return
        self._last_confirmed_at = time.monotonic()
        if index > unconfirmed[0].number:
            self._confirmed.add(index)
            return
        self._forget_first()
        while unconfirmed and unconfirmed[0].number in self._confirmed:
            self._confirmed.discard(unconfirmed[0].number)
            self._forget_first()
        if not unconfirmed:
            self._resolve_flushes(None)

    def _forget_first(self) -> None:
        self._bytes -= len(self._unconfirmed.popleft().frame)

    def _resolve_flushes(self, error: Unavailable | None) -> None:
        waiting, self._flush_waiters = self._flush_waiters, []
        for future in waiting:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def sweep(self, now: float) -> None:
        """Send all unconfirmed events again if one was refused or lost."""
        if self._unconfirmed and (self._must_resend or now - self._last_confirmed_at > RESEND_AFTER_S):
            self.resend()

    def resend(self) -> None:
        """Begin a round: send all unconfirmed events, in order."""
        self._round += 1
        self._must_resend = False
        self._last_confirmed_at = time.monotonic()
        for one in self._unconfirmed:
            if self._must_resend:
                return
            self._send(one)

    @property
    def is_full(self) -> bool:
        """Whether there are too many unconfirmed events, by count or bytes."""
        return len(self._unconfirmed) >= MAX_UNCONFIRMED_EVENTS or self._bytes >= MAX_UNCONFIRMED_BYTES

    async def flush(self) -> None:
        if self._lost:
            raise _closed_error()
        if not self._unconfirmed:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flush_waiters.append(future)
        try:
            await future
        finally:
            with contextlib.suppress(ValueError):
                self._flush_waiters.remove(future)

    def close(self) -> None:
        """Drop the unconfirmed events; open `flush` calls raise Unavailable."""
        self.closed = True
        self._lost = self._lost or bool(self._unconfirmed)
        self._unconfirmed.clear()
        self._confirmed.clear()
        self._bytes = 0
        self._resolve_flushes(_closed_error())


def _closed_error() -> Unavailable:
    return Unavailable("the events of this attempt were not all stored before its writer was closed")
