"""The gateway's side of the bus on NATS JetStream.

All replies to a process, and the PubAcks of its jobs, arrive on one wildcard subscription `nexus.reply.<gateway>.*`. Large bodies
and answers travel over the blob store's connection, so that none of them delays a reply here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import Any, NamedTuple

import orjson
import structlog

from backbone.bus.bus import Queue, QueueChange, QueueDepth, ReplyListener, StorageUsage
from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.backlog_releaser import BacklogReleaser, OnMoved, backlog_headers
from backbone.bus.nats.backlogs import Backlog, Backlogs, StartMark
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.headers import parse_status
from backbone.bus.nats.jetstream import (
    SETUP_BACKOFF,
    JobsStreamConfig,
    ensure_stream,
    find_job,
    holds_job,
    read_dead_letter_counts,
    read_depths,
    read_storage,
)
from backbone.bus.nats.queue_consumers import QueueConsumers
from backbone.bus.nats.queue_positions import QueuePositions
from backbone.bus.nats.queue_reader import QueueReader
from backbone.bus.nats.requests import LIMIT_REACHED, OUTAGE_TIMEOUT_S, JetStreamError, RequestInbox, call_api
from backbone.bus.nats.stream_reader import StreamReader
from backbone.bus.nats.write_probe import StorageHealth
from backbone.bus.outage import nats_unavailable
from backbone.bus.queue_listing import QueuePage
from backbone.bus.subjects import (
    BACKLOG_NOTICES,
    BROADCAST,
    JOBS_STREAM,
    REPLIES,
    WORKER_CONTROL,
    encode_owner,
    is_gateway_reply,
    is_reply_subject,
    is_token,
    job_subject,
    parse_job_subject,
    stream_of_job,
)
from backbone.ids import new_token
from backbone.retry import retry
from schemas.errors import BackendFailed, NexusError, QueueFull, RequestTooLarge, Unavailable
from schemas.frames import STOP
from schemas.jobs import Envelope

log = structlog.get_logger(__name__)

RESEND_INTERVAL_S = 2.0
"""An unacknowledged submit is repeated after this time; its message id keeps it one job."""
SUBMIT_TIMEOUT_S = 10.0
"""While NATS is there: a stream that has lost its leader has a new one by then. During an outage, OUTAGE_TIMEOUT_S is enough.
"""
SETTLE_DELAY_S = 1.0
"""After a reconnect, for acknowledgements that are on their way from workers."""
LOST_JOB_CHECK_INTERVAL_S = 5.0
"""Between checks whether the jobs that have waited longest are still stored."""
LOST_JOB_CHECKS_PER_QUEUE = 4
"""Jobs at the head of a queue that are checked: workers take the oldest, so that a lost job soon is among them."""
MAX_ENVELOPE_BYTES = 8192
DELETE_SUBJECT = "$JS.API.STREAM.MSG.DELETE."


@dataclass(slots=True)
class _Unacked:
    """A submitted job without its PubAck."""

    subject: bytes
    message: bytes
    reply: bytes
    message_id: bytes
    owner: str
    listener: ReplyListener
    since: float
    sent: float
    backlog: Backlog | None = None
    """The backlog into which the job goes; None: it goes into its queue."""


class _Stored(NamedTuple):
    """A stored job whose end has not arrived."""

    seq: int
    message_id: bytes
    subject: bytes
    """Of its queue."""


class NatsGatewayBus:
    """The gateway's side of the bus; see backbone.bus.bus.GatewayBus."""

    def __init__(
        self,
        server: NatsAccess | str,
        *,
        gateway: str,
        ack_wait_s: float,
        stream: JobsStreamConfig,
        storage_health: StorageHealth | None = None,
        backlogs: Backlogs | None = None,
    ) -> None:
        """`backlogs` are shared by this gateway's connections; None: jobs of all owners wait in one line."""
        self._storage_health = storage_health or StorageHealth()
        self._connection = NatsConnection(
            server, f"{gateway}-jobs", on_reconnect=self._reconnected, monitor_liveness=True
        )
        self._prefix = f"{REPLIES}.{gateway}."
        self._prefix_length = len(self._prefix)
        self._discard_subject = f"{self._prefix}void".encode()
        self._puback_prefix = f"{new_token()}-".encode()
        """The prefix of a job's token in the subject of its PubAck. No worker knows it, so that none can confirm a job in
        JetStream's place.
        """
        self._puback_subject_prefix = self._prefix.encode() + self._puback_prefix
        self._stream = stream
        self._inbox = RequestInbox(self._connection)
        self._consumers = QueueConsumers(self._connection, self._inbox, stream, ack_wait_s)
        replicated = stream.replicas > 1
        self._backlogs = backlogs or Backlogs()
        self._releaser = BacklogReleaser(
            self._connection, self._inbox, self._consumers, self._backlogs, replicated=replicated
        )
        self._consumers.on_checked = lambda stored: self._backlogs.update(
            stored, may_lower=not self._releaser.is_elected
        )
        self._positions = QueuePositions(self._inbox, self._backlogs, replicated=replicated)
        self._queue_reader = QueueReader(self._inbox, self._backlogs, replicated=replicated)
        self._jobs = StreamReader(self._inbox, JOBS_STREAM, replicated=replicated)
        self._unstarted: dict[bytes, StartMark] = {}
        """Jobs of which no event has come, by token."""
        self._running: dict[bytes, StartMark] = {}
        """Jobs that started while others waited in a backlog."""
        self._listeners: dict[bytes, ReplyListener] = {}
        self._readers: dict[bytes, Callable[[bytes], None]] = {}
        """Receivers of what is no job's event, by token."""
        self._unacked: dict[bytes, _Unacked] = {}
        self._stored: dict[bytes, _Stored] = {}
        self._openings: set[asyncio.Task[None]] = set()
        self._sweep_task: asyncio.Task[None] | None = None
        self._reopen_task: asyncio.Task[None] | None = None
        self._lost_job_task: asyncio.Task[None] | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Connect, create the stream, and subscribe to the replies."""
        self._loop = asyncio.get_running_loop()
        await self._connection.connect()
        await self._inbox.start()
        await ensure_stream(self._inbox, self._stream)
        await self._consumers.start()
        await self._connection.subscribe(f"{self._prefix}*", self._on_reply)
        await self._connection.subscribe(f"{BACKLOG_NOTICES}.*.*.*.*", self._backlogs.on_notification)
        await self._releaser.start()
        self._sweep_task = asyncio.create_task(self._sweep())
        self._watch_task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        await self._releaser.close()
        await self._consumers.close()
        for task in (self._sweep_task, self._watch_task, self._reopen_task, self._lost_job_task, *self._openings):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        await self._connection.close()
        self._inbox.close()

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""
        return self._connection.connected

    @property
    def max_message_bytes(self) -> int:
        """The server's limit less the bytes of the envelope."""
        return self._connection.client.max_payload - MAX_ENVELOPE_BYTES

    async def _reconnected(self) -> None:
        """Set the stream and the queues up again: the server may have lost its data. Check the stored jobs: events that were sent
        meanwhile were lost.
        """
        self._inbox.forget_lost()
        for task in (self._reopen_task, self._lost_job_task):
            if task is not None:
                task.cancel()
        self._reopen_task = asyncio.create_task(self._reopen_all())
        self._lost_job_task = asyncio.create_task(self._fail_lost_jobs())

    async def _reopen_all(self) -> None:
        async def set_up() -> None:
            await ensure_stream(self._inbox, self._stream)
            await self._consumers.reload()

        await retry(
            set_up,
            on=Unavailable,
            backoff=SETUP_BACKOFF,
            on_error=lambda error: log.warning("nats.setup_failed", part="jobs", error=str(error)),
        )

    async def _fail_lost_jobs(self) -> None:
        """Fail the jobs that are not stored any more: their last event was sent during the outage."""
        await asyncio.sleep(SETTLE_DELAY_S)
        for token, one in list(self._stored.items()):
            if token in self._stored and not await self._is_stored(token, one):
                self._fail_lost_job(token)

    def _fail_lost_job(self, token: bytes) -> None:
        listener = self._listeners.get(token)
        if listener is not None:
            listener.on_refused(
                BackendFailed("the end of this answer was lost; send the request again", code="events_lost")
            )

    async def _watch(self) -> None:
        """Check waiting jobs at intervals. A worker's event can be lost although both their connections stood, between two servers of
        a cluster one of which froze.
        """
        while True:
            await asyncio.sleep(LOST_JOB_CHECK_INTERVAL_S)
            lines: dict[bytes, list[tuple[int, bytes]]] = {}
            for token, one in self._stored.items():
                if self._is_waiting(token):
                    lines.setdefault(one.subject, []).append((one.seq, token))
            for line in lines.values():
                await self._fail_lost_jobs_of_queue(token for _, token in sorted(line))

    async def _fail_lost_jobs_of_queue(self, tokens: Iterator[bytes]) -> None:
        """Fail the lost jobs of one queue, oldest first, until some are found to be stored."""
        there = 0
        for token in tokens:
            one = self._stored.get(token)
            if one is None or not self._is_waiting(token):
                continue
            if await self._is_stored(token, one):
                there += 1
                if there == LOST_JOB_CHECKS_PER_QUEUE:
                    return
                continue
            await asyncio.sleep(SETTLE_DELAY_S)
            if self._is_waiting(token):
                self._fail_lost_job(token)

    def _is_waiting(self, token: bytes) -> bool:
        listener = self._listeners.get(token)
        return listener is not None and listener.is_waiting

    async def _is_stored(self, token: bytes, one: _Stored) -> bool:
        async def check() -> bool:
            if await holds_job(self._inbox, one.seq, one.message_id):
                return True
            # Events that were sent before the job was deleted have arrived when this returns.
            await self._connection.ping(5.0)
            return self._stored.get(token) is not one or await self._was_moved(token, one)

        return await retry(check, on=Unavailable, backoff=SETUP_BACKOFF)

    async def _was_moved(self, token: bytes, one: _Stored) -> bool:
        """Look in the queue for a job of the backlog; the notice that it was moved may be lost."""
        if stream_of_job(one.seq) == JOBS_STREAM:
            return False
        moved = await find_job(self._jobs, one.subject.decode(), one.message_id)
        if moved is None or self._stored.get(token) is not one:
            return False
        self._note_moved(token, one, moved)
        return True

    def _note_moved(self, token: bytes, one: _Stored, seq: int) -> None:
        self._stored[token] = one._replace(seq=seq)
        listener = self._listeners.get(token)
        if listener is not None:
            listener.on_stored(seq)

    async def open_queue(self, queue: Queue) -> None:
        await self._consumers.ensure_consumer(queue)

    async def apply_holds(self, is_held: Callable[[str], bool]) -> None:
        await self._consumers.apply_holds(is_held)

    async def free_queues(self, is_served: Callable[[Queue], bool], grace_s: float) -> int:
        return await self._consumers.free(is_served, grace_s)

    def is_queue_refused(self, queue: Queue) -> bool:
        return self._consumers.refuses(queue)

    @property
    def queues_are_full(self) -> bool:
        return self._consumers.full

    @property
    def queue_count(self) -> int:
        return len(self._consumers.existing)

    def on_queue_change(self, changed: Callable[[QueueChange], None]) -> None:
        """Call `changed` for each queue that this gateway creates, deletes, restores, or is refused."""
        self._consumers.on_change = changed

    def new_reply_subject(self) -> str:
        """Return 128 random bits below this gateway's prefix."""
        return self._prefix + new_token()

    def submit(self, envelope: Envelope, body: bytes, listener: ReplyListener, line: bytes = b"") -> None:
        """Publish the job. Its PubAck arrives beside the replies and is checked there; nothing waits for it."""
        if not self._connection.connected:
            raise nats_unavailable()
        self._storage_health.require_available()
        if len(body) > self.max_message_bytes:
            raise RequestTooLarge(f"the request is larger than {self.max_message_bytes} bytes, the limit of NATS")
        assert self._loop is not None
        message = b"%b\n%b" % (line, body) if line else envelope.encode(body)
        reply = envelope.reply.encode()
        token = reply[self._prefix_length :]
        subject = job_subject(envelope.capability, envelope.lane, envelope.model).encode()
        message_id = f"{envelope.job}.{envelope.run}".encode()
        now = self._loop.time()
        one = _Unacked(subject, message, reply, message_id, envelope.owner, listener, now, now)
        if subject in self._consumers.existing:
            self._send(token, one)
        else:
            self._listeners[token] = listener
            queue = Queue(envelope.capability, envelope.lane, envelope.model)
            self._spawn(self._open_and_send(queue, token, one))

    def _send(self, token: bytes, one: _Unacked) -> None:
        backlog = self._backlogs.find(one.subject) or self._backlogs.of(Queue(*parse_job_subject(one.subject.decode())))
        if backlog.is_closed:
            one.backlog = backlog
        self._publish_job(token, one)
        self._listeners[token] = one.listener
        self._unacked[token] = one
        self._unstarted[token] = StartMark(backlog, one.owner, one.backlog is None)
        if one.backlog is None:
            backlog.unstarted += 1
        else:
            backlog.unconfirmed += 1

    def _publish_job(self, token: bytes, one: _Unacked) -> None:
        address = self._puback_subject_prefix + token
        if one.backlog is None:
            self._connection.publish_with_id(one.subject, one.message, address, one.message_id)
        else:
            headers = backlog_headers(one.message_id, address)
            self._connection.publish(one.backlog.subject_of(one.owner), one.message, address, headers)

    async def _open_and_send(self, queue: Queue, token: bytes, one: _Unacked) -> None:
        """Create the queue for its first job, then send the job."""
        try:
            await self._consumers.ensure_consumer(queue)
            if one.listener.is_waiting:
                self._send(token, one)
            else:  # the caller has disconnected meanwhile
                self.release(one.reply.decode())
        except NexusError as error:
            one.listener.on_refused(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._openings.add(task)
        task.add_done_callback(self._openings.discard)

    async def _reopen_queue(self, subject: bytes) -> None:
        """Create a queue again that was deleted while a job for it was on its way."""
        with contextlib.suppress(NexusError):  # the next check of the queues repeats it
            await self._consumers.serve(Queue(*parse_job_subject(subject.decode())))

    def release(self, reply: str) -> None:
        token = reply[self._prefix_length :].encode()
        listener = self._listeners.pop(token, None)
        self._readers.pop(token, None)
        self._forget_unacked(token)
        self._stored.pop(token, None)
        if token in self._unstarted:  # it was given up, or its attempts sent nothing
            self._take_mark(token)
        elif token in self._running:
            mark = self._running.pop(token)
            started_at = listener.started_at if listener is not None else None
            if started_at is not None:
                self._releaser.record_use(mark.backlog.queue, encode_owner(mark.owner), monotonic() - started_at)

    def _forget_unacked(self, token: bytes) -> _Unacked | None:
        one = self._unacked.pop(token, None)
        if one is not None and one.backlog is not None:
            one.backlog.unconfirmed -= 1
        return one

    def _note_start(self, token: bytes) -> None:
        """Note that a job does not wait any more."""
        mark = self._take_mark(token)
        if mark.backlog.order.total:
            self._running[token] = mark
            mark.backlog.note_start()

    def _take_mark(self, token: bytes) -> StartMark:
        mark = self._unstarted.pop(token)
        if mark.direct:
            mark.backlog.unstarted -= 1
        return mark

    def record_start(self, queue: Queue) -> None:
        if (backlog := self._backlogs.find(job_subject(*queue).encode())) is not None:
            backlog.note_start()

    def record_use(self, queue: Queue, owner: str, seconds: float) -> None:
        self._releaser.record_use(queue, encode_owner(owner), seconds)

    def on_job_moved(self, moved: OnMoved) -> None:
        """Call `moved` for each durable job that this gateway moves from a backlog into its queue."""
        self._releaser.on_moved = moved

    async def queue_position(self, queue: Queue, seq: int) -> int | None:
        return await self._positions.before(queue, seq)

    def _on_reply(self, subject: bytes, answer_to: bytes, headers: bytes, data: bytes) -> None:
        token = subject[self._prefix_length :]
        if token.startswith(self._puback_prefix):
            if data:
                self._on_puback(token[len(self._puback_prefix) :], data)
            else:
                # JetStream is not up yet: `_sweep` repeats the submit.
                log.debug("job.no_responders", status=parse_status(headers))
            return
        listener = self._listeners.get(token)
        if listener is None:
            if (reader := self._readers.get(token)) is not None:
                reader(data)
            elif answer_to:
                self._answer(answer_to, STOP)
            return
        if token in self._unstarted:
            self._note_start(token)
        answer = listener.on_event(data)
        if answer is not None and answer_to:
            self._answer(answer_to, answer)

    def _answer(self, subject: bytes, answer: bytes) -> None:
        if not is_reply_subject(subject):
            self._connection.refusals.add("address", address=repr(subject[:100]))
            return
        with contextlib.suppress(Unavailable):
            self._connection.publish(subject, answer)

    def _on_puback(self, token: bytes, data: bytes) -> None:
        ack = orjson.loads(data)
        error = ack.get("error")
        unacked = self._forget_unacked(token)
        if unacked is None:
            stored = self._stored.get(token)
            if stored is not None and error is None and stream_of_job(ack["seq"]) != stream_of_job(stored.seq):
                self._note_moved(token, stored, ack["seq"])
            elif stored is None and ack.get("moved"):  # its caller left while it moved
                self.delete_job(ack["seq"])
            return
        if error is None:
            self._stored[token] = _Stored(ack["seq"], unacked.message_id, unacked.subject)
            if unacked.backlog is not None:
                self._backlogs.note_backlogged(unacked.backlog, encode_owner(unacked.owner))
            unacked.listener.on_stored(ack["seq"])
            if unacked.subject not in self._consumers.existing:
                self._spawn(self._reopen_queue(unacked.subject))
            return
        log.warning("job.store_refused", error=error)
        refusal: NexusError
        if error.get("err_code") == LIMIT_REACHED:
            refusal = QueueFull()
        else:
            refusal = Unavailable(f"the queue cannot store the job: {error.get('description')}")
        unacked.listener.on_refused(refusal)

    async def _sweep(self) -> None:
        """Repeat submits without a PubAck, and fail those that are too old."""
        assert self._loop is not None
        while True:
            await asyncio.sleep(0.5)
            now = self._loop.time()
            for token, one in list(self._unacked.items()):
                waited = now - one.since
                if waited > OUTAGE_TIMEOUT_S and self._connection.unavailable:
                    self._forget_unacked(token)
                    one.listener.on_refused(nats_unavailable())
                elif waited > SUBMIT_TIMEOUT_S:
                    self._forget_unacked(token)
                    self._storage_health.report_doubt()
                    one.listener.on_refused(Unavailable("NATS did not confirm the job in time; retry shortly"))
                elif now - one.sent > RESEND_INTERVAL_S and self.connected:
                    one.sent = now
                    with contextlib.suppress(Unavailable):
                        self._publish_job(token, one)

    def delete_job(self, seq: int) -> None:
        """Delete by sequence, without reading the reply."""
        with contextlib.suppress(Unavailable):
            subject = f"{DELETE_SUBJECT}{stream_of_job(seq)}".encode()
            self._connection.publish(subject, b'{"seq":%d,"no_erase":true}' % seq, self._discard_subject)

    def send_control(self, worker: str, message: bytes) -> None:
        """Publish on core NATS. An invalid worker name is refused and counted."""
        if not is_token(worker):
            self._connection.refusals.add("worker", worker=worker[:100])
            return
        with contextlib.suppress(Unavailable):
            self._connection.publish(f"{WORKER_CONTROL}.{worker}".encode(), message)

    def listen(self, reply: str, on_message: Callable[[bytes], None]) -> None:
        self._readers[reply[self._prefix_length :].encode()] = on_message

    def send_reply(self, reply: str, message: bytes) -> None:
        """Publish on core NATS."""
        if not is_gateway_reply(reply):
            self._connection.refusals.add("address", address=reply[:100])
            return
        with contextlib.suppress(Unavailable):
            self._connection.publish(reply.encode(), message)

    def send_to_gateways(self, topic: str, message: bytes) -> None:
        """Publish on core NATS."""
        with contextlib.suppress(Unavailable):
            self._connection.publish(f"{BROADCAST}.{topic}".encode(), message)

    async def subscribe_gateways(self, topic: str, on_message: Callable[[bytes], None]) -> None:
        await self._connection.subscribe(
            f"{BROADCAST}.{topic}", lambda _subject, _reply, _headers, data: on_message(data)
        )

    async def queue_depths(self) -> list[QueueDepth]:
        return await read_depths(self._inbox, self._consumers.forget)

    async def oldest_queued_at(self, depth: QueueDepth) -> int | None:
        return await self._positions.oldest_queued_at(depth)

    async def list_jobs(self, model: str, after: str, limit: int) -> QueuePage:
        return await self._queue_reader.page(model, after, limit)

    async def dead_letter_counts(self) -> dict[str, int]:
        return await read_dead_letter_counts(self._inbox)

    async def storage_usage(self) -> StorageUsage:
        return await read_storage(self._inbox)

    async def server_time_s(self) -> float:
        """Return the time that the leader of the jobs stream reports."""
        try:
            info = await call_api(self._inbox, f"STREAM.INFO.{JOBS_STREAM}", timeout_s=1.0)
        except JetStreamError as error:
            raise Unavailable(f"NATS: {error}") from error
        return datetime.fromisoformat(info["ts"]).timestamp()

    async def ping(self) -> None:
        """Read the stream's state."""
        if not self.connected:
            raise Unavailable("this process is not connected to NATS")
        try:
            await call_api(self._inbox, f"STREAM.INFO.{JOBS_STREAM}", timeout_s=1.0)
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"the jobs stream cannot be used: {error}") from error
