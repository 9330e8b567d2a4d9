"""Requests to NATS and to the JetStream API over one inbox, without a subscription and a task for each request.

- `RequestInbox.request` sends one request and returns a future for the reply.
- `call_api` calls the JetStream API once. `request_until_answered` repeats a request until it is answered, over lost connections
  and streams that are still being made. `store_message` stores a message that way.

JetStreamError is the one error for what JetStream answers and refuses; Unavailable says that there was no answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from backbone.bus.nats.connection import NatsConnection, id_headers
from backbone.bus.nats.headers import StatusHeader, parse_status
from backbone.bus.outage import nats_unavailable
from schemas.errors import RequestTooLarge, Unavailable

API = "$JS.API"
CALL_TIMEOUT_S = 2.0
RETRY_TIMEOUT_S = 10.0
"""How long a request is repeated while NATS is there: a stream that has lost its leader has a new one by then."""
OUTAGE_TIMEOUT_S = 3.0
"""How long a request is repeated that an outage of NATS interrupts. A request that begins during a known outage fails at once."""
ATTEMPT_TIMEOUT_S = 2.0
"""The request is sent again after this time: the reply may be lost although the connection stands."""
RETRY_DELAY_S = 0.1

# Status codes of NATS
NO_RESPONDERS = 503
NOT_FOUND = frozenset({404, 204})

# Error codes of JetStream
CONSUMER_NOT_FOUND = 10014
MAX_CONSUMERS_REACHED = 10026
NO_MESSAGE = 10037
INSUFFICIENT_STORAGE = 10047
"""Also the answer for a stream that exists: nats-server checks its storage for a new stream before it checks whether the stream is new."""
STREAM_NAME_IN_USE = 10058
STREAM_NOT_FOUND = 10059
LIMIT_REACHED = 10077
"""A limit of the stream keeps the message out: of bytes, of messages, or of messages per subject."""
WRONG_LAST_SEQUENCE = frozenset({10071, 10164})
"""The subject holds another message than expected; streams with several replicas answer the second code."""


class JetStreamError(Exception):
    """JetStream answered with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        self.text = str(error.get("description", "unknown error"))
        super().__init__(self.text)
        self.code = int(error.get("err_code", 0))

    @property
    def limit_reached(self) -> bool:
        """Whether a limit of the stream keeps the message out."""
        return self.code == LIMIT_REACHED

    @property
    def subject_limit_reached(self) -> bool:
        """Whether the subject holds as many messages as it may."""
        return self.limit_reached and "per subject" in self.text


class ReplyMessage(NamedTuple):
    """One message of a reply, as it came."""

    headers: bytes
    data: bytes

    @property
    def status(self) -> StatusHeader | None:
        """The status, where the message is nothing but a status."""
        return parse_status(self.headers) if self.headers and not self.data else None

    @property
    def has_no_responders(self) -> bool:
        """Whether nobody listens on the subject: JetStream is not up, or the stream does not exist yet."""
        status = self.status
        return status is not None and status.code == NO_RESPONDERS

    def header(self, name: bytes) -> bytes | None:
        """Return the value of a header."""
        _, found, rest = self.headers.partition(b"\r\n" + name + b": ")
        return rest.partition(b"\r\n")[0] if found else None

    def api_response(self) -> dict[str, Any]:
        """Return the response of the JetStream API. Raises JetStreamError; Unavailable where nobody listens."""
        if self.has_no_responders:
            raise Unavailable("NATS JetStream does not answer: check that it is enabled and that this user may call it")
        response: dict[str, Any] = orjson.loads(self.data)
        if (error := response.get("error")) is not None:
            raise JetStreamError(error)
        return response


ReplyFuture = asyncio.Future[list[ReplyMessage] | None]
"""The messages of a reply, in order; None: the connection was lost before the reply was complete. Cancel it to drop the request."""


class StoredAck(NamedTuple):
    """JetStream's confirmation of a stored message."""

    seq: int
    duplicate: bool
    """The message had been stored before, under the same message id."""


@dataclass(slots=True)
class _PendingRequest:
    """A request without a complete reply."""

    reply: ReplyFuture
    many: bool
    reconnect_count: int
    """How often the connection had reconnected when the request was sent."""
    messages: list[ReplyMessage] = field(default_factory=list)


class RequestInbox:
    """The open requests of one connection."""

    def __init__(self, connection: NatsConnection) -> None:
        self._connection = connection
        self._pending: dict[bytes, _PendingRequest] = {}
        self._prefix = f"{connection.new_inbox()}."
        self._prefix_length = len(self._prefix)
        self._next = 0
        self.closed = False
        self.require_storage: Callable[[], None] = lambda: None
        """Raises Unavailable where NATS is known to store nothing; see `backbone.bus.nats.write_probe`."""
        connection.on_lost.append(self._drop_all)
        self.discard_subject = f"{self._prefix}void".encode()
        """The reply subject of requests whose reply is not read."""

    async def start(self) -> None:
        """Subscribe to the replies. Call it once, after the first connection."""
        await self._connection.subscribe(f"{self._prefix}*", self._on_reply)

    def request(
        self, subject: bytes, payload: bytes | memoryview, *, headers: bytes = b"", many: bool = False
    ) -> ReplyFuture:
        """Send a request. With `many`, the reply ends with a message that is a status.

        Raises Unavailable when not connected, and InvalidSubject.
        """
        if not self.connected:
            raise nats_unavailable()
        self._next += 1
        token = b"%d" % self._next
        self._connection.publish(subject, payload, self._prefix.encode() + token, headers)
        reply: ReplyFuture = asyncio.get_running_loop().create_future()
        self._pending[token] = _PendingRequest(reply, many, self._reconnect_count)
        reply.add_done_callback(lambda _: self._pending.pop(token, None))
        return reply

    @property
    def connected(self) -> bool:
        """Whether requests can be sent now."""
        return self._connection.connected

    @property
    def unavailable(self) -> bool:
        """Whether NATS is known to be away, so that repeating a request is of no use for now."""
        return self._connection.unavailable

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes."""
        return self._connection.client.max_payload

    @property
    def _reconnect_count(self) -> int:
        return self._connection.client.stats["reconnects"]

    def _on_reply(self, subject: bytes, _reply: bytes, headers: bytes, data: bytes) -> None:
        pending = self._pending.get(subject[self._prefix_length :])
        if pending is None or pending.reply.done():
            return
        message = ReplyMessage(headers, data)
        pending.messages.append(message)
        if not pending.many or message.status is not None:
            pending.reply.set_result(pending.messages)

    def _drop_all(self) -> None:
        """End every open request: the connection is lost, and with it the replies."""
        for pending in list(self._pending.values()):
            if not pending.reply.done():
                pending.reply.set_result(None)

    def forget_lost(self) -> None:
        """End the requests that were sent before the last reconnect. Call it after each reconnect."""
        for pending in list(self._pending.values()):
            if not pending.reply.done() and (self.closed or pending.reconnect_count != self._reconnect_count):
                pending.reply.set_result(None)

    def close(self) -> None:
        """End every open request, and let `request_until_answered` end."""
        self.closed = True
        self.forget_lost()


def message_id_headers(text: str) -> bytes:
    """Return the headers that make JetStream store a message once per duplicate window. Raises InvalidSubject."""
    return id_headers(text.encode())


async def call_api(
    inbox: RequestInbox, operation: str, body: Any = None, *, timeout_s: float = CALL_TIMEOUT_S
) -> dict[str, Any]:
    """Call the JetStream API once. Raises JetStreamError; Unavailable, at once where there is no connection."""
    payload = b"" if body is None else orjson.dumps(body)
    reply = inbox.request(f"{API}.{operation}".encode(), payload)
    try:
        async with asyncio.timeout(timeout_s):
            messages = await reply
    except TimeoutError as error:
        raise Unavailable(f"NATS JetStream did not answer within {timeout_s:g} s") from error
    if messages is None:
        raise Unavailable("the connection to NATS was lost during the request")
    return messages[0].api_response()


async def request_until_answered(
    inbox: RequestInbox,
    subject: bytes,
    payload: bytes,
    *,
    headers: bytes = b"",
    many: bool = False,
    max_timeouts: int = 1000,
) -> list[ReplyMessage]:
    """Repeat a request until it is answered, and return the reply. The request may be carried out more than once.

    Raises Unavailable after RETRY_TIMEOUT_S, or after `max_timeouts` attempts without a reply on a connection that stood; at once
    where NATS is known to be away, and after OUTAGE_TIMEOUT_S where an outage begins meanwhile.
    """
    if inbox.unavailable:
        raise nats_unavailable()
    loop = asyncio.get_running_loop()
    began = loop.time()
    deadline = began + RETRY_TIMEOUT_S
    while not inbox.closed:
        try:
            reply = inbox.request(subject, payload, headers=headers, many=many)
            async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                messages = await reply
            if messages is not None and not messages[0].has_no_responders:
                return messages
        except TimeoutError:
            max_timeouts -= 1
        except Unavailable:
            pass  # not connected
        if inbox.unavailable and loop.time() > began + OUTAGE_TIMEOUT_S:
            raise nats_unavailable()
        if not max_timeouts or loop.time() + RETRY_DELAY_S > deadline:
            break
        await asyncio.sleep(RETRY_DELAY_S)
    raise Unavailable(
        "NATS JetStream does not answer: the stream has no leader, or its disk is too slow; retry shortly"
    )


async def call_api_until_answered(inbox: RequestInbox, operation: str, body: Any = None) -> dict[str, Any]:
    """Call the JetStream API, repeatedly until it answers. Raises JetStreamError, Unavailable."""
    payload = b"" if body is None else orjson.dumps(body)
    return (await request_until_answered(inbox, f"{API}.{operation}".encode(), payload))[0].api_response()


async def store_message(
    inbox: RequestInbox, subject: bytes, payload: bytes, headers: bytes = b"", *, max_payload: int = 0
) -> StoredAck:
    """Store a message, and repeat it with the same headers until NATS confirms it.

    Raises JetStreamError, RequestTooLarge, Unavailable: at once where NATS is known to store nothing. A message above `max_payload`
    bytes is not sent: NATS would close the connection.
    """
    inbox.require_storage()
    if max_payload and len(headers) + len(payload) > max_payload:
        raise RequestTooLarge(
            f"a message of {len(payload)} bytes is larger than {max_payload} bytes, the limit of NATS"
        )
    ack = (await request_until_answered(inbox, subject, payload, headers=headers))[0].api_response()
    return StoredAck(ack["seq"], ack.get("duplicate", False))
