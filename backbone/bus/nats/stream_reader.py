"""Reads one stream by direct gets, which any replica answers, and deletes from it.

A replica may lag behind: in a replicated stream, the leader is asked for a message that the replica does not have.
"""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Any, NamedTuple

import orjson

from backbone.bus.nats.requests import (
    NO_MESSAGE,
    NOT_FOUND,
    JetStreamError,
    ReplyMessage,
    RequestInbox,
    call_api_until_answered,
    request_until_answered,
)
from schemas.errors import Unavailable

BATCH_SIZE = 256
BATCH_BYTES = 1024 * 1024
"""One batch is limited to this size; its last message may exceed it."""
NOTHING_DELETED_CODES = frozenset({10043, 10057, NO_MESSAGE})


class StoredMessage(NamedTuple):
    """A stored message."""

    seq: int
    subject: str
    headers: bytes
    data: bytes
    stored_at: int
    """Unix seconds, by NATS's clock."""

    def header(self, name: bytes) -> bytes | None:
        """Return the value of a header."""
        return ReplyMessage(self.headers, self.data).header(name)


class StreamReader:
    """Reads and deletes messages of one stream."""

    def __init__(self, inbox: RequestInbox, stream: str, *, replicated: bool) -> None:
        self._inbox = inbox
        self._replicated = replicated
        self._stream = stream
        self._direct = f"$JS.API.DIRECT.GET.{stream}".encode()

    async def last(self, subject: str) -> StoredMessage | None:
        """Return the newest message on a subject; None: it holds none. Raises Unavailable."""
        answer = (await request_until_answered(self._inbox, self._direct + b"." + subject.encode(), b""))[0]
        if answer.status is None:
            return _message(answer)
        _require_not_found(answer)
        return await self.from_leader({"last_by_subj": subject}) if self._replicated else None

    async def find(self, seq: int) -> StoredMessage | None:
        """Return the message with this sequence; None: it does not exist. Raises Unavailable."""
        found, _ = await self.batch(seq, count=1)
        return found[0] if found and found[0].seq == seq else None

    async def batch(
        self, seq: int, subject: str | None = None, count: int = BATCH_SIZE
    ) -> tuple[list[StoredMessage], int | None]:
        """Return up to `count` messages from sequence `seq` on, of `subject` or of all, and how many follow them (None:
        unknown).

        The list is empty only when there are none. Raises Unavailable.
        """
        where: dict[str, Any] = {"seq": max(seq, 1)}
        if subject is not None:
            where["next_by_subj"] = subject
        body = orjson.dumps(where | {"batch": min(count, BATCH_SIZE), "max_bytes": BATCH_BYTES})
        answers = await request_until_answered(self._inbox, self._direct, body, many=True)
        found = [_message(one) for one in answers if one.status is None]
        if found:
            left = answers[-1].header(b"Nats-Num-Pending")
            return found, int(left) if left and not self._replicated else None
        _require_not_found(answers[-1])
        if not self._replicated:
            return [], 0
        message = await self.from_leader(where if subject is not None else where | {"next_by_subj": ">"})
        return ([message], None) if message else ([], 0)

    async def count_after(self, seq: int, subject: str) -> int | None:
        """Return how many messages `subject` has after the one with sequence `seq`; None: it does not hold that one. Raises
        Unavailable.
        """
        body = orjson.dumps({"seq": seq, "next_by_subj": subject, "batch": 1})
        answer = (await request_until_answered(self._inbox, self._direct, body, many=True))[0]
        if answer.status is not None:
            _require_not_found(answer)
            there = await self.from_leader({"seq": seq}) if self._replicated else None
            # A message that the replica lacks is among the newest.
            return 0 if there is not None and there.subject == subject else None
        if _message(answer).seq != seq:
            return None
        return int(answer.header(b"Nats-Num-Pending") or 0)

    async def from_leader(self, where: dict[str, Any]) -> StoredMessage | None:
        """Return the message that the stream's leader has; None: it has none. Raises Unavailable."""
        try:
            response = await call_api_until_answered(self._inbox, f"STREAM.MSG.GET.{self._stream}", where)
        except JetStreamError as error:
            if error.code == NO_MESSAGE:
                return None
            raise Unavailable(f"NATS cannot read from the stream {self._stream}: {error}") from error
        found = response["message"]
        headers, data = (base64.b64decode(found.get(part, "")) for part in ("hdrs", "data"))
        return StoredMessage(found["seq"], found["subject"], headers, data, _unix(found["time"]))

    async def delete(self, seq: int) -> bool:
        """Delete a message. False: it did not exist, or an earlier attempt of this call has deleted it. Raises Unavailable."""
        body = {"seq": seq, "no_erase": True}
        try:
            await call_api_until_answered(self._inbox, f"STREAM.MSG.DELETE.{self._stream}", body)
        except JetStreamError as error:
            if error.code in NOTHING_DELETED_CODES:
                return False
            raise Unavailable(f"NATS cannot delete a message of the stream {self._stream}: {error}") from error
        return True

    async def erase(self, seq: int) -> None:
        """Delete a message and overwrite its bytes on the disk. Idempotent. Raises Unavailable."""
        try:
            await call_api_until_answered(self._inbox, f"STREAM.MSG.DELETE.{self._stream}", {"seq": seq})
        except JetStreamError as error:
            if error.code not in NOTHING_DELETED_CODES:
                raise Unavailable(f"NATS cannot erase a message of the stream {self._stream}: {error}") from error

    async def state(self, subject: str | None = None) -> dict[str, Any]:
        """Return the stream's state, with the number of messages on `subject`. Raises Unavailable."""
        response = await self._info({"subjects_filter": subject} if subject is not None else None)
        state: dict[str, Any] = response["state"]
        return state

    async def subjects(self, filter_: str) -> list[str]:
        """Return every subject below `filter_` that holds a message. Raises Unavailable."""
        found: list[str] = []
        while True:
            response = await self._info({"subjects_filter": filter_, "offset": len(found)})
            page = response["state"].get("subjects") or {}
            found += page
            if not page or len(found) >= response.get("total", 0):
                return found

    async def _info(self, body: Any) -> dict[str, Any]:
        try:
            return await call_api_until_answered(self._inbox, f"STREAM.INFO.{self._stream}", body)
        except JetStreamError as error:
            raise Unavailable(f"NATS cannot read the state of the stream {self._stream}: {error}") from error


def _message(answer: ReplyMessage) -> StoredMessage:
    return StoredMessage(
        int(answer.header(b"Nats-Sequence") or 0),
        (answer.header(b"Nats-Subject") or b"").decode(),
        answer.headers,
        answer.data,
        _unix((answer.header(b"Nats-Time-Stamp") or b"").decode()),
    )


def _unix(stamp: str) -> int:
    return int(datetime.fromisoformat(stamp[:19] + "+00:00").timestamp()) if stamp else 0


def _require_not_found(answer: ReplyMessage) -> None:
    status = answer.status
    if status is None or status.code not in NOT_FOUND:
        raise Unavailable(f"NATS cannot read from a stream: {status}")
