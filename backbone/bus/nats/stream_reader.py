"""Reading one stream by direct gets, which any replica answers, and deleting from it.

A replica may lag: what it does not have, the stream's leader is asked for, where there is more than one replica.
"""

from __future__ import annotations

import asyncio
import base64
from datetime import datetime
from typing import Any, NamedTuple

import orjson

from backbone.bus.bus import Queue
from backbone.bus.nats.request_inbox import ReplyMessage, RequestInbox
from backbone.bus.nats.requests import NO_MESSAGE, NOT_FOUND, JetStreamError, request_until_answered
from backbone.bus.subjects import JOBS_STREAM, consumer_name, job_subject
from schemas.errors import Unavailable

BATCH = 256
BATCH_BYTES = 1024 * 1024
"""At most so much of one batch is asked for; its last message may go beyond it."""
NOTHING_DELETED = frozenset({10043, 10057, NO_MESSAGE})


class StoredMessage(NamedTuple):
    """A stored message."""

    seq: int
    subject: str
    headers: bytes
    data: bytes
    stored_at: int
    """Unix seconds, by NATS's clock."""

    def header(self, name: bytes) -> bytes | None:
        """A header's value."""
        return ReplyMessage(self.headers, self.data).header(name)


class StreamReader:
    """What is stored in one stream."""

    def __init__(self, inbox: RequestInbox, stream: str, *, replicated: bool) -> None:
        self._inbox = inbox
        self._replicated = replicated
        self._info = f"$JS.API.STREAM.INFO.{stream}".encode()
        self._direct = f"$JS.API.DIRECT.GET.{stream}".encode()
        self._leader = f"$JS.API.STREAM.MSG.GET.{stream}".encode()
        self._delete = f"$JS.API.STREAM.MSG.DELETE.{stream}".encode()

    async def last(self, subject: str) -> StoredMessage | None:
        """The newest message on a subject. Raises Unavailable."""
        answer = (await request_until_answered(self._inbox, self._direct + b"." + subject.encode(), b""))[0]
        if answer.status is None:
            return _message(answer)
        _require_not_found(answer)
        return await self.from_leader({"last_by_subj": subject}) if self._replicated else None

    async def batch(
        self, seq: int, subject: str | None = None, count: int = BATCH
    ) -> tuple[list[StoredMessage], int | None]:
        """Up to `count` messages from sequence `seq` on, of `subject` or of all, and how many come after them (None: who
        knows). Empty only when there are none. Raises Unavailable.
        """
        where: dict[str, Any] = {"seq": max(seq, 1)}
        if subject is not None:
            where["next_by_subj"] = subject
        body = orjson.dumps(where | {"batch": min(count, BATCH), "max_bytes": BATCH_BYTES})
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
        """How many messages `subject` has after that of sequence `seq`; None: it has none with it. Raises Unavailable."""
        body = orjson.dumps({"seq": seq, "next_by_subj": subject, "batch": 1})
        answer = (await request_until_answered(self._inbox, self._direct, body, many=True))[0]
        if answer.status is not None:
            _require_not_found(answer)
            there = await self.from_leader({"seq": seq}) if self._replicated else None
            # What a replica does not have yet is among the newest.
            return 0 if there is not None and there.subject == subject else None
        if _message(answer).seq != seq:
            return None
        return int(answer.header(b"Nats-Num-Pending") or 0)

    async def from_leader(self, where: dict[str, Any]) -> StoredMessage | None:
        """What the leader has. Raises Unavailable."""
        answer = orjson.loads((await request_until_answered(self._inbox, self._leader, orjson.dumps(where)))[0].data)
        error = answer.get("error")
        if error is not None:
            refusal = JetStreamError(error)
            if refusal.code == NO_MESSAGE:
                return None
            raise Unavailable(f"NATS: {refusal}")
        found = answer["message"]
        headers, data = (base64.b64decode(found.get(part, "")) for part in ("hdrs", "data"))
        return StoredMessage(found["seq"], found["subject"], headers, data, _unix(found["time"]))

    async def delete(self, seq: int) -> bool:
        """Delete a message; False: it was not there, or an earlier try of this call has deleted it. Raises Unavailable."""
        body = b'{"seq":%d,"no_erase":true}' % seq
        answer = orjson.loads((await request_until_answered(self._inbox, self._delete, body))[0].data)
        error = answer.get("error")
        if error is None:
            return True
        refusal = JetStreamError(error)
        if refusal.code in NOTHING_DELETED:
            return False
        raise Unavailable(f"NATS: {refusal}")

    async def state(self, subject: str | None = None) -> dict[str, Any]:
        """The stream's state, with the count of messages on `subject`. Raises Unavailable."""
        body = orjson.dumps({"subjects_filter": subject}) if subject is not None else b""
        answer = orjson.loads((await request_until_answered(self._inbox, self._info, body))[0].data)
        error = answer.get("error")
        if error is not None:
            raise Unavailable(f"NATS: {JetStreamError(error)}")
        state: dict[str, Any] = answer["state"]
        return state

    async def subjects(self, filter_: str) -> list[str]:
        """Every subject below `filter_` that has a message. Raises Unavailable."""
        found: list[str] = []
        while True:
            body = orjson.dumps({"subjects_filter": filter_, "offset": len(found)})
            answer = orjson.loads((await request_until_answered(self._inbox, self._info, body))[0].data)
            if (error := answer.get("error")) is not None:
                raise Unavailable(f"NATS: {JetStreamError(error)}")
            page = answer["state"].get("subjects") or {}
            found += page
            if not page or len(found) >= answer.get("total", 0):
                return found


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
        raise Unavailable(f"NATS does not read what is stored: {status}")


class QueuePositions:
    """Reads the jobs stream: three questions at once, none of which reads other jobs."""

    def __init__(self, inbox: RequestInbox, *, replicated: bool) -> None:
        self._inbox = inbox
        self._jobs = StreamReader(inbox, JOBS_STREAM, replicated=replicated)

    async def before(self, queue: Queue, seq: int) -> int | None:
        """Those stored before `seq`, less those that run: a worker takes the oldest. None: `seq` is not there.

        What changes meanwhile makes it inexact, never negative. Raises Unavailable.
        """
        subject = job_subject(*queue)
        after, state, running = await asyncio.gather(
            self._jobs.count_after(seq, subject), self._jobs.state(subject), self._running(queue)
        )
        if after is None:
            return None
        stored: int = (state.get("subjects") or {}).get(subject, 0)
        before: int = stored - after - 1 - running
        return max(0, before)

    async def _running(self, queue: Queue) -> int:
        subject = f"$JS.API.CONSUMER.INFO.{JOBS_STREAM}.{consumer_name(*queue)}".encode()
        # Without the consumer nothing runs.
        return int(
            orjson.loads((await request_until_answered(self._inbox, subject, b""))[0].data).get("num_ack_pending", 0)
        )
