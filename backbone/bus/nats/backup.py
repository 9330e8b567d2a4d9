"""Backup and restore of whole streams: JetStream's snapshots, and the messages that were stored after one.

A snapshot is JetStream's own compressed archive of a stream's messages and consumers. It arrives in chunks, each confirmed
before more than a few mebibytes are on their way, and is restored the same way, so that memory does not grow with the stream.
Sequences, times and the state of consumers are preserved.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import orjson

from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.headers import parse_status
from backbone.bus.nats.requests import (
    API,
    CONSUMER_NOT_FOUND,
    STREAM_NOT_FOUND,
    JetStreamError,
    ReplyMessage,
    RequestInbox,
    call_api_until_answered,
    request_until_answered,
    store_message,
)
from backbone.bus.nats.stream_reader import StoredMessage, StreamReader
from backbone.bus.subjects import (
    AUDIT_QUEUE,
    BACKLOG_STREAM,
    BLOBS_STREAM,
    BROADCAST,
    CLAIMS_STREAM,
    CONTENT_KEYS_STREAM,
    DEAD_LETTERS_STREAM,
    EVENTS,
    EVENTS_STREAM,
    JOBS_STREAM,
    OUTCOMES,
    OUTCOMES_STREAM,
    SEALS_STREAM,
    USAGE_QUEUE,
    stream_of_job,
    work_queue_stream,
)
from schemas.errors import Unavailable
from schemas.frames import decode_frame
from schemas.job_events import QUEUED
from schemas.jobs import JobRecord

WEBHOOKS_STREAM = work_queue_stream("hooks")
BATCHES_STREAM = work_queue_stream("batches")
USAGE_STREAM = work_queue_stream(USAGE_QUEUE)
AUDIT_STREAM = work_queue_stream(AUDIT_QUEUE)
STREAMS = (
    SEALS_STREAM,
    BLOBS_STREAM,
    BATCHES_STREAM,
    BACKLOG_STREAM,
    JOBS_STREAM,
    OUTCOMES_STREAM,
    DEAD_LETTERS_STREAM,
    WEBHOOKS_STREAM,
    USAGE_STREAM,
    AUDIT_STREAM,
    CLAIMS_STREAM,
    CONTENT_KEYS_STREAM,
    EVENTS_STREAM,
)
"""All streams of Nexus, in the order in which they are saved; see cli.backup.create."""

CHUNK_BYTES = 256 * 1024
"""Bytes of a chunk during a restore, far below `max_payload`."""
MAX_UNCONFIRMED_BYTES = 4 * 1024 * 1024
"""Bytes that NATS may send without a confirmation."""
TRANSFER_TIMEOUT_S = 30.0
"""A transfer that makes no progress for this time has failed."""
RESTORE_TIMEOUT_S = 600.0
"""The time that NATS gets to build the stream."""
CHECK_INTERVAL_S = 1.0
"""Between checks whether the connection stands."""
GATEWAY_REPLY_TIMEOUT_S = 0.5
"""NATS reports within this time that nobody listens; no report means that gateways do."""
FIRST_ERROR_STATUS = 400
NOT_FOUND_CODES = frozenset({STREAM_NOT_FOUND, CONSUMER_NOT_FOUND})
ADDED_HEADERS = frozenset(
    (b"nats-stream", b"nats-subject", b"nats-sequence", b"nats-time-stamp", b"nats-num-pending", b"nats-last-sequence")
)
"""Headers that NATS adds when it reads a message."""
APPEND_BATCH_SIZE = 64
"""Messages of a tail that are stored in parallel."""

T = TypeVar("T")
Config = dict[str, Any]


class StreamSnapshot(NamedTuple):
    """The stream and the state that a snapshot was taken of."""

    config: Config
    state: dict[str, Any]

    @property
    def last_seq(self) -> int:
        """The sequence of the last message that can be in it."""
        return int(self.state["last_seq"])


class SavedMessage(NamedTuple):
    """A stored message."""

    subject: str
    headers: bytes
    """As they were stored, or empty."""
    data: bytes


class StreamBackup:
    """Saves and restores streams, one at a time, over one connection. All methods raise Unavailable, and JetStreamError."""

    def __init__(self, server: NatsAccess | str, name: str = "backup") -> None:
        self._connection = NatsConnection(server, name, on_reconnect=self._reconnected)
        self._inbox = RequestInbox(self._connection)
        self._arrived: asyncio.Queue[tuple[bytes, bytes, bytes] | None] = asyncio.Queue()

    async def start(self) -> None:
        """Connect."""
        await self._connection.connect()
        await self._inbox.start()

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.close()
        self._inbox.close()

    @property
    def server_version(self) -> str:
        """The version of the connected server."""
        version = self._connection.client.connected_server_version
        return f"{version.major}.{version.minor}.{version.patch}"

    async def _reconnected(self) -> None:
        self._inbox.forget_lost()
        self._arrived.put_nowait(None)

    # State

    async def state(self, stream: str) -> dict[str, Any] | None:
        """Return a stream's state; None: the stream does not exist."""
        try:
            found: dict[str, Any] = (await self._call(f"STREAM.INFO.{stream}"))["state"]
        except JetStreamError as error:
            if error.code in NOT_FOUND_CODES:
                return None
            raise
        return found

    async def has_gateways(self) -> bool:
        """Return whether gateways run: they subscribe to broadcasts. The notification that this sends makes them reload their
        keys, which changes nothing.
        """
        try:
            async with asyncio.timeout(GATEWAY_REPLY_TIMEOUT_S):
                answers = await self._inbox.request(f"{BROADCAST}.keys".encode(), b"")
        except TimeoutError:
            return True
        return answers is None or not answers[0].has_no_responders

    # Save

    async def save(
        self, stream: str, write: Callable[[bytes], object], *, consumers: bool = True
    ) -> StreamSnapshot | None:
        """Pass a snapshot to `write` in chunks; None: the stream does not exist. Messages that are deleted meanwhile may be in
        it or not.
        """
        self._arrived = asyncio.Queue()
        inbox = self._connection.new_inbox()
        sid = await self._connection.subscribe(inbox, self._on_chunk)
        wanted = {
            "deliver_subject": inbox,
            "no_consumers": not consumers,
            "chunk_size": CHUNK_BYTES,
            "window_size": MAX_UNCONFIRMED_BYTES,
        }
        try:
            reply = await self._call_once(f"STREAM.SNAPSHOT.{stream}", wanted, TRANSFER_TIMEOUT_S)
            await self._receive(stream, write)
        except JetStreamError as error:
            if error.code in NOT_FOUND_CODES:
                return None
            raise
        finally:
            self._connection.drop_subscription(sid)
        return StreamSnapshot(reply["config"], reply["state"])

    def _on_chunk(self, _subject: bytes, reply: bytes, headers: bytes, data: bytes) -> None:
        self._arrived.put_nowait((reply, headers, data))

    async def _receive(self, stream: str, write: Callable[[bytes], object]) -> None:
        while True:
            chunk = await self._while_connected(self._arrived.get(), TRANSFER_TIMEOUT_S)
            if chunk is None:
                raise Unavailable(f"the connection to NATS was lost during the snapshot of {stream}")
            reply, headers, data = chunk
            if data:
                write(data)
                if reply:
                    self._connection.publish(reply, b"")
                continue
            status = parse_status(headers) if headers else None
            if status is not None and status.code >= FIRST_ERROR_STATUS:
                raise Unavailable(f"NATS aborted the snapshot of {stream}: {status.code} {status.text}")
            return

    async def read_tail(self, stream: str, after: int) -> AsyncGenerator[SavedMessage, None]:
        """Yield the messages after sequence `after` that still exist."""
        reader = StreamReader(self._inbox, stream, replicated=True)
        left: int | None = None
        while left != 0:
            found, left = await reader.batch(after + 1)
            if not found:
                return
            for message in found:
                yield SavedMessage(message.subject, _original_headers(message.headers), message.data)
            after = found[-1].seq

    # Restore

    async def restore(self, stream: str, taken: StreamSnapshot, chunks: Iterable[bytes]) -> dict[str, Any]:
        """Create the stream from a snapshot, and return its state. No stream of that name may exist. `taken.config` may differ
        from the saved one, as in its number of replicas.
        """
        reply = await self._call_once(
            f"STREAM.RESTORE.{stream}", {"config": taken.config, "state": taken.state}, TRANSFER_TIMEOUT_S
        )
        where = reply["deliver_subject"].encode()
        for chunk in chunks:
            answer = await self._reply(where, chunk, TRANSFER_TIMEOUT_S)
            if answer.data:
                answer.api_response()
            if answer.has_no_responders:
                raise Unavailable(f"NATS aborted the restore of {stream}; see the log of nats-server")
        (await self._reply(where, b"", RESTORE_TIMEOUT_S)).api_response()
        state = await self.state(stream)
        if state is None:
            raise Unavailable(f"NATS lost the stream {stream} right after it was restored; see the log of nats-server")
        return state

    async def append(self, pieces: Iterable[SavedMessage]) -> int:
        """Store messages again at the end of their streams, and return their number."""
        count = 0
        for batch in _batches(pieces, APPEND_BATCH_SIZE):
            await asyncio.gather(*(self._append(piece) for piece in batch))
            count += len(batch)
        return count

    async def _append(self, piece: SavedMessage) -> None:
        await store_message(self._inbox, piece.subject.encode(), piece.data, piece.headers)

    async def delete_consumers_ahead(self, stream: str, last_seq: int) -> list[str]:
        """Delete consumers with a position beyond the last message, and return their names: they would miss new messages.
        Servers before 2.15 save consumers after messages. Gateways create them again.
        """
        listed = await self._call(f"CONSUMER.LIST.{stream}", {"offset": 0})
        ahead = [one["name"] for one in listed["consumers"] or () if one["delivered"]["stream_seq"] > last_seq]
        for name in ahead:
            await self._call(f"CONSUMER.DELETE.{stream}.{name}")
        return ahead

    async def delete_lost_jobs(self, *, after: int, last: dict[str, int]) -> int:
        """Delete the traces of lost jobs; see LostJobCleaner."""
        return await LostJobCleaner(self._inbox).delete_lost(after=after, last=last)

    async def delete(self, stream: str) -> None:
        """Delete a stream if it exists."""
        try:
            await self._call(f"STREAM.DELETE.{stream}")
        except JetStreamError as error:
            if error.code not in NOT_FOUND_CODES:
                raise

    # Requests

    async def _call(self, operation: str, body: Any = None) -> dict[str, Any]:
        """Call the JetStream API; the call may be carried out twice."""
        return await call_api_until_answered(self._inbox, operation, body)

    async def _call_once(self, subject: str, body: Any, timeout_s: float) -> dict[str, Any]:
        return (await self._reply(f"{API}.{subject}".encode(), orjson.dumps(body), timeout_s)).api_response()

    async def _reply(self, subject: bytes, payload: bytes, timeout_s: float) -> ReplyMessage:
        answers = await self._while_connected(self._inbox.request(subject, payload), timeout_s)
        if answers is None:
            raise Unavailable("the connection to NATS was lost")
        return answers[0]

    async def _while_connected(self, wanted: Awaitable[T], timeout_s: float) -> T:
        """Wait for a result within this time. Raises Unavailable, also when the connection is lost: a transfer does not survive
        that.
        """
        future = asyncio.ensure_future(wanted)
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            while not future.done():
                await asyncio.wait([future], timeout=CHECK_INTERVAL_S)
                if not future.done() and not self._connection.connected:
                    raise Unavailable("the connection to NATS was lost")
                if not future.done() and asyncio.get_running_loop().time() > deadline:
                    raise Unavailable(f"NATS did not respond within {timeout_s:g} s")
            return future.result()
        finally:
            future.cancel()


def _original_headers(headers: bytes) -> bytes:
    """Return the headers without those that NATS added."""
    lines = headers.strip().split(b"\r\n")[1:]
    own = [line for line in lines if line.partition(b":")[0].lower() not in ADDED_HEADERS]
    return b"\r\n".join((b"NATS/1.0", *own, b"", b"")) if own else b""


def _batches(pieces: Iterable[SavedMessage], size: int) -> Iterable[list[SavedMessage]]:
    batch: list[SavedMessage] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


PURGE = f"{API}.STREAM.PURGE.{EVENTS_STREAM}".encode()


class LostJobCleaner:
    """Deletes events of jobs that a restored queue does not hold. Its methods raise Unavailable."""

    def __init__(self, inbox: RequestInbox) -> None:
        self._inbox = inbox
        self._events = StreamReader(inbox, EVENTS_STREAM, replicated=True)
        self._outcomes = StreamReader(inbox, OUTCOMES_STREAM, replicated=True)

    async def delete_lost(self, *, after: int, last: dict[str, int]) -> int:
        """Delete the events of jobs that were queued after the sequence in `last` of their stream and have no outcome, and return
        the number of jobs. Their events are stored after the events' sequence `after`.
        """
        count, left = 0, None
        while left != 0:
            found, left = await self._events.batch(after + 1)
            if not found:
                break
            for message in found:
                count += await self._delete_if_lost(message, last)
            after = found[-1].seq
        return count

    async def _delete_if_lost(self, message: StoredMessage, last: dict[str, int]) -> bool:
        job = message.subject.removeprefix(f"{EVENTS}.")
        run = _run_queued_after(message, last)
        if not run or await self._outcomes.last(f"{OUTCOMES}.{job}") is not None:
            return False
        if run > 1:  # a lost retry: the earlier runs are not lost
            await self._events.delete(message.seq)
        else:
            await request_until_answered(self._inbox, PURGE, orjson.dumps({"filter": message.subject}))
        return True


def _run_queued_after(message: StoredMessage, last: dict[str, int]) -> int:
    """Return the run that, by this event, was queued after the last sequence of its stream; 0: the event says no such thing."""
    try:
        frame = decode_frame(message.data)
        if frame.kind != QUEUED:
            return 0
        seq = JobRecord.decode(frame.payload).seq
    except ValueError:
        return 0
    return frame.run if seq is not None and seq > last.get(stream_of_job(seq), 0) else 0
