"""Asking NATS until it answers, and storing messages so: over lost connections, answers that never come, and streams that
are still being made.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import orjson

from backbone.bus.nats.connection import id_headers
from backbone.bus.nats.request_inbox import ReplyMessage, RequestInbox
from backbone.bus.outage import nats_unavailable
from schemas.errors import RequestTooLarge, Unavailable

RETRY_TIMEOUT_S = 10.0
"""How long a question is repeated while NATS is there: a stream whose leader is lost has a new one by then."""
OUTAGE_TIMEOUT_S = 3.0
"""How long a question is repeated that NATS's absence met under way. One that begins while NATS is known to be away is
refused at once.
"""
ATTEMPT_TIMEOUT_S = 2.0
"""It is asked again after this; the connection can be up and the answer lost."""
RETRY_DELAY_S = 0.1
NO_RESPONDERS = 503
NOT_FOUND = frozenset({404, 204})
NO_MESSAGE = 10037
FULL = 10077
"""JetStream's code for a message that a limit of its stream keeps out: of bytes, of messages, or per subject."""


class JetStreamError(Exception):
    """JetStream answered, and said no."""

    def __init__(self, error: dict[str, object]) -> None:
        self.text = str(error.get("description", "unknown error"))
        super().__init__(self.text)
        self.code = int(str(error.get("err_code", 0)))

    @property
    def full(self) -> bool:
        """There is no room."""
        return self.code == FULL

    @property
    def taken(self) -> bool:
        """The subject has as many messages as it takes."""
        return self.full and "per subject" in self.text


class StoredAck(NamedTuple):
    """What NATS confirmed."""

    seq: int
    again: bool
    """It had been stored before, under the same message id."""


def message_id_headers(text: str) -> bytes:
    """The headers that make JetStream store a message once per window. Raises InvalidSubject."""
    return id_headers(text.encode())


async def request_until_answered(
    inbox: RequestInbox,
    subject: bytes,
    payload: bytes,
    *,
    headers: bytes = b"",
    many: bool = False,
    tries: int = 1000,
) -> list[ReplyMessage]:
    """Ask until there is an answer. It may be carried out more than once. Raises Unavailable after PATIENCE_S, or after
    so many `tries` that were not answered though the connection stood; at once where NATS is known to be away, and after
    OUTAGE_S where that is learned meanwhile.
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
                answers = await reply
            if answers is not None and not has_no_responders(answers[0]):
                return answers
        except TimeoutError:
            tries -= 1
        except Unavailable:
            pass  # not connected
        if inbox.unavailable and loop.time() > began + OUTAGE_TIMEOUT_S:
            raise nats_unavailable()
        if not tries or loop.time() + RETRY_DELAY_S > deadline:
            break
        await asyncio.sleep(RETRY_DELAY_S)
    raise Unavailable(
        "NATS JetStream does not answer: the stream has no leader, or its disk is too slow; retry shortly"
    )


async def store_message(
    inbox: RequestInbox, subject: bytes, payload: bytes, headers: bytes = b"", *, max_payload: int = 0
) -> StoredAck:
    """Store a message, under the same headers until NATS confirms it. Raises Refused, RequestTooLarge, Unavailable: at once
    where NATS is known to store nothing.

    What is over `max_payload` is not sent: NATS would close the connection.
    """
    inbox.require_storage()
    if max_payload and len(headers) + len(payload) > max_payload:
        raise RequestTooLarge(f"a message of {len(payload)} bytes is larger than the {max_payload} that NATS takes")
    answer = orjson.loads((await request_until_answered(inbox, subject, payload, headers=headers))[0].data)
    error = answer.get("error")
    if error is not None:
        raise JetStreamError(error)
    return StoredAck(answer["seq"], answer.get("duplicate", False))


def has_no_responders(answer: ReplyMessage) -> bool:
    """Nobody listens there: JetStream is not up, or the stream does not exist yet."""
    status = answer.status
    return status is not None and status.code == NO_RESPONDERS
