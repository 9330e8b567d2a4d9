"""Questions to NATS over one inbox: no subscription and no task for each, as nats-py's `request` needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.headers import StatusHeader, parse_status
from backbone.bus.outage import nats_unavailable


class ReplyMessage(NamedTuple):
    """One message of an answer, as it came."""

    headers: bytes
    data: bytes

    @property
    def status(self) -> StatusHeader | None:
        """The status, where that is all the message is."""
        return parse_status(self.headers) if self.headers and not self.data else None

    def header(self, name: bytes) -> bytes | None:
        """A header's value."""
        _, found, rest = self.headers.partition(b"\r\n" + name + b": ")
        return rest.partition(b"\r\n")[0] if found else None


ReplyFuture = asyncio.Future[list[ReplyMessage] | None]
"""The messages of an answer, in order; None: the connection was lost before it was whole. Cancel it to forget it."""


@dataclass(slots=True)
class _PendingRequest:
    """A question without its answer."""

    reply: ReplyFuture
    many: bool
    reconnect_count: int
    """Which one of the reconnected connections it went out on."""
    answers: list[ReplyMessage] = field(default_factory=list)


class RequestInbox:
    """What was asked on one connection, and is not answered yet."""

    def __init__(self, connection: NatsConnection) -> None:
        self._connection = connection
        self._open: dict[bytes, _PendingRequest] = {}
        self._prefix = f"{connection.new_inbox()}."
        self._prefix_length = len(self._prefix)
        self._next = 0
        self.closed = False
        self.require_storage: Callable[[], None] = lambda: None
        """Raises Unavailable where NATS is known to store nothing; see `backbone.bus.nats.write_probe`."""
        connection.on_lost.append(self._forget_all)
        self.discard_subject = f"{self._prefix}void".encode()
        """Where an answer goes that nobody waits for."""

    async def start(self) -> None:
        """Listen; once, after the first connection."""
        await self._connection.subscribe(f"{self._prefix}*", self._on_reply)

    def request(
        self, subject: bytes, payload: bytes | memoryview, *, headers: bytes = b"", many: bool = False
    ) -> ReplyFuture:
        """Ask; with `many` the answer goes on until a message that is a status. Raises Unavailable when not connected, and InvalidSubject."""
        if not self.connected:
            raise nats_unavailable()
        self._next += 1
        token = b"%d" % self._next
        address = self._prefix.encode() + token
        self._connection.publish(subject, payload, address, headers)
        reply: ReplyFuture = asyncio.get_running_loop().create_future()
        self._open[token] = _PendingRequest(reply, many, self._reconnect_count)
        reply.add_done_callback(lambda _: self._open.pop(token, None))
        return reply

    @property
    def connected(self) -> bool:
        """Whether anything can be asked now."""
        return self._connection.connected

    @property
    def _reconnect_count(self) -> int:
        return self._connection.client.stats["reconnects"]

    def _on_reply(self, subject: bytes, _reply: bytes, headers: bytes, data: bytes) -> None:
        one = self._open.get(subject[self._prefix_length :])
        if one is None or one.reply.done():
            return
        answer = ReplyMessage(headers, data)
        one.answers.append(answer)
        if not one.many or answer.status is not None:
            one.reply.set_result(one.answers)

    @property
    def unavailable(self) -> bool:
        """Whether NATS is known to be away, so that to ask again is of no use for now."""
        return self._connection.unavailable

    def _forget_all(self) -> None:
        """The connection is lost: what was asked on it is never answered."""
        for one in list(self._open.values()):
            if not one.reply.done():
                one.reply.set_result(None)

    def forget_lost(self) -> None:
        """After a reconnect: what was asked before it is never answered."""
        for one in list(self._open.values()):
            if not one.reply.done() and (self.closed or one.reconnect_count != self._reconnect_count):
                one.reply.set_result(None)

    def close(self) -> None:
        """Nothing will be answered any more."""
        self.closed = True
        self.forget_lost()
