"""The gateway's side of durable jobs on NATS JetStream, over a connection of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson
import structlog

from backbone.bus.bus import Queue
from backbone.bus.job_log import Retention, StoredDeadLetter, StoredEvent, StoredOutcome, WorkItem
from backbone.bus.nats import outcomes
from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.backlogs import Backlogs
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.dead_letters import DeadLetterStream
from backbone.bus.nats.event_reader import EventReader
from backbone.bus.nats.jetstream import SETUP_BACKOFF, find_job, holds_job, read_job
from backbone.bus.nats.outcome_retention import OutcomeRetention
from backbone.bus.nats.pull_consumer import PullConsumer
from backbone.bus.nats.queue_positions import QueuePositions
from backbone.bus.nats.requests import (
    WRONG_LAST_SEQUENCE,
    JetStreamError,
    RequestInbox,
    message_id_headers,
    request_until_answered,
    store_message,
)
from backbone.bus.nats.rpc_server import GateRequestHandler, RpcServer
from backbone.bus.nats.stream_configs import ensure_content_keys, ensure_job_streams, ensure_pull_consumer
from backbone.bus.nats.stream_reader import StreamReader
from backbone.bus.nats.work_queue import Make, NatsWorkQueue
from backbone.bus.nats.write_probe import StorageHealth, WriteProbe
from backbone.bus.seals import SECRET_BYTES, SealSecret
from backbone.bus.subjects import (
    BACKLOG_STREAM,
    CLAIMS_STREAM,
    CONTENT_KEYS_BUCKET,
    CONTENT_KEYS_STREAM,
    EVENTS,
    EVENTS_STREAM,
    JOBS_STREAM,
    OUTCOME_CONSUMER,
    OUTCOMES,
    OUTCOMES_STREAM,
    SEAL_SECRET_SUBJECT,
    SEALS_BUCKET,
    SEALS_STREAM,
    STORED_OUTCOMES,
    claim_subject,
    is_token,
    job_subject,
    require_token,
    stream_of_job,
)
from backbone.retry import retry
from schemas.errors import QueueFull, RequestTooLarge, Unavailable
from schemas.jobs import Envelope
from schemas.outcome import Outcome

log = structlog.get_logger(__name__)

MAX_ENVELOPE_BYTES = 8192
"""The part of NATS's limit for a message that a job's envelope may take beside the request's body."""
CREATE_ONLY = b"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: %d\r\n\r\n"
DELETE_JOB = "$JS.API.STREAM.MSG.DELETE."
CLAIM_RETRY_DELAY_S = 0.01


@dataclass(eq=False, slots=True)
class _OutcomeWatch:
    """A wait for the outcome of one job."""

    stored: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """The outcome may have been stored: read it."""


class NatsJobLog:
    """Durable jobs on NATS; see backbone.bus.job_log.JobLog."""

    def __init__(
        self,
        server: NatsAccess | str,
        name: str,
        *,
        retention: Retention,
        max_envelope_bytes: int = MAX_ENVELOPE_BYTES,
        storage_health: StorageHealth | None = None,
        backlogs: Backlogs | None = None,
    ) -> None:
        """Configure the log. `storage_health` and `backlogs` are shared by this gateway's connections; this one keeps the first
        current.
        """
        self._connection = NatsConnection(
            server, f"{name}-log", on_reconnect=self._reconnected, resend_on_reconnect=False, monitor_liveness=True
        )
        self._inbox = RequestInbox(self._connection)
        self._storage_health = storage_health or StorageHealth()
        self._inbox.require_storage = self._storage_health.require_available
        self._probe_task: asyncio.Task[None] | None = None
        self._retention = retention
        self._max_envelope_bytes = max_envelope_bytes
        replicated = retention.replicas > 1
        self._jobs = StreamReader(self._inbox, JOBS_STREAM, replicated=replicated)
        self._events = StreamReader(self._inbox, EVENTS_STREAM, replicated=replicated)
        self._outcomes = StreamReader(self._inbox, OUTCOMES_STREAM, replicated=replicated)
        self._claims = StreamReader(self._inbox, CLAIMS_STREAM, replicated=replicated)
        self._secrets = StreamReader(self._inbox, SEALS_STREAM, replicated=replicated)
        self._secret: SealSecret | None = None
        self._content_keys = StreamReader(self._inbox, CONTENT_KEYS_STREAM, replicated=replicated)
        self._has_content_keys = False
        self._dead_letters = DeadLetterStream(self._inbox, replicated=replicated)
        self._backlogs = backlogs or Backlogs()
        self._queue_positions = QueuePositions(self._inbox, self._backlogs, replicated=replicated)
        self._retention_limit = OutcomeRetention(self._inbox, retention.max_outcome_bytes, replicated=replicated)
        self._retention_task: asyncio.Task[None] | None = None
        self._work_queues: dict[str, NatsWorkQueue] = {}
        self._event_readers: set[EventReader] = set()
        self._outcome_watches: dict[bytes, set[_OutcomeWatch]] = {}
        """By the subject on which NATS publishes that an outcome is stored."""
        self._consumers: set[PullConsumer] = set()
        self._rpc_servers: list[RpcServer] = []
        self._created_at = ""
        """When NATS created the stream of events; another time means that it has lost everything."""
        self._setup_task: asyncio.Task[None] | None = None
        self._closed = False

    # Connection

    async def start(self) -> None:
        """Connect, and create the streams and the bucket."""
        await self._connection.connect()
        await self._inbox.start()
        self._created_at = await ensure_job_streams(self._inbox, self._retention)
        await self._share_secret()
        await self._connection.subscribe(f"{STORED_OUTCOMES}.*", self._on_ended)
        await self._connection.ping()  # from here on, NATS notifies this gateway of every outcome
        self._retention_task = asyncio.create_task(self._retention_limit.run())
        proof = WriteProbe(self._inbox, self._storage_health, replicated=self._retention.replicas > 1)
        self._probe_task = asyncio.create_task(proof.run())

    async def close(self) -> None:
        """Disconnect; open readers and consumers raise Unavailable."""
        self._closed = True
        for task in (self._retention_task, self._probe_task, self._setup_task):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        for rpc_server in self._rpc_servers:
            await rpc_server.close()
        for reader in list(self._event_readers):
            reader.close()
        for pull_consumer in list(self._consumers):
            pull_consumer.close()
        await self._connection.close()
        self._inbox.close()
        self._recheck_outcomes()

    async def _reconnected(self) -> None:
        self._inbox.forget_lost()
        self._has_content_keys = False
        if self._setup_task is not None:
            self._setup_task.cancel()
        if not self._closed:
            self._setup_task = asyncio.create_task(self._set_up_again())

    async def _set_up_again(self) -> None:
        """Create lost streams again after a reconnect; then readers, watches and consumers check what they have missed."""

        async def set_up() -> str:
            created_at = await ensure_job_streams(self._inbox, self._retention)
            await self._share_secret()
            for work_queue in list(self._work_queues.values()):
                await work_queue.create_stream()
            return created_at

        created_at = await retry(
            set_up,
            on=Unavailable,
            backoff=SETUP_BACKOFF,
            on_error=lambda error: log.warning("nats.setup_failed", part="job_log", error=str(error)),
        )
        stream_was_lost, self._created_at = created_at != self._created_at, created_at
        for reader in list(self._event_readers):
            reader.resume(stream_was_lost)
        self._recheck_outcomes()
        for pull_consumer in list(self._consumers):
            pull_consumer.resume()

    # The gateways' secret

    @property
    def seal_secret(self) -> SealSecret | None:
        return self._secret

    async def _share_secret(self) -> None:
        """Read the gateways' secret. The first gateway creates it, and a gateway whose server has lost it stores it again."""
        there = await self._secrets.from_leader({"last_by_subj": SEAL_SECRET_SUBJECT})
        if there is None:
            own_key = self._secret.key if self._secret is not None else os.urandom(SECRET_BYTES)
            try:
                await store_message(
                    self._inbox, SEAL_SECRET_SUBJECT.encode(), own_key, CREATE_ONLY % 0, max_payload=self._max_payload
                )
            except JetStreamError as error:
                if error.code not in WRONG_LAST_SEQUENCE:
                    raise Unavailable(f"NATS cannot store the gateways' secret: {error}") from error
            there = await self._secrets.from_leader({"last_by_subj": SEAL_SECRET_SUBJECT})
        if there is None or len(there.data) != SECRET_BYTES:
            raise Unavailable(
                f"the gateways' secret in the bucket '{SEALS_BUCKET}' is missing or damaged; restore it from a backup"
            )
        self._secret = SealSecret(there.data, there.stored_at)

    # The queue

    async def enqueue(self, envelope: Envelope, body: bytes, *, replaces: int = 0) -> int:
        """Publish to the jobs stream or the stream of backlogs, which `NatsGatewayBus` creates."""
        if len(body) > self._max_payload - self._max_envelope_bytes:
            raise RequestTooLarge(
                f"the request is larger than {self._max_payload - self._max_envelope_bytes} bytes, the limit of NATS"
            )
        queue = Queue(envelope.capability, envelope.lane, envelope.model)
        message_id = f"{require_token(envelope.job)}.{envelope.run}"
        headers = message_id_headers(f"{message_id}.{replaces}" if replaces else message_id)
        try:
            async with self._backlogs.durable_subject(queue, envelope.owner) as subject:
                stored = await store_message(
                    self._inbox, subject, envelope.encode(body), headers, max_payload=self._max_payload
                )
        except JetStreamError as error:
            if error.limit_reached:
                raise QueueFull from error
            raise Unavailable(f"the queue cannot store the job: {error}") from error
        except Unavailable:
            if self._connection.connected:
                self._storage_health.report_doubt()
            raise
        return stored.seq

    @property
    def _max_payload(self) -> int:
        return self._inbox.max_payload

    async def queue_position(self, queue: Queue, seq: int) -> int | None:
        return await self._queue_positions.before(queue, seq)

    async def read_job(self, seq: int, job: str, run: int) -> bytes | None:
        return await read_job(self._inbox, seq, f"{job}.{run}".encode())

    async def delete_job(self, queue: Queue, seq: int, job: str, run: int) -> None:
        """Delete by sequence after a check of the stored job, until NATS confirms it."""
        message_id = f"{job}.{run}".encode()
        if await holds_job(self._inbox, seq, message_id):
            await self._delete_stored(seq, message_id)
        if stream_of_job(seq) == BACKLOG_STREAM:  # stored in the queue before it is deleted there
            moved = await find_job(self._jobs, job_subject(*queue), message_id)
            if moved is not None:
                await self._delete_stored(moved, message_id)

    async def _delete_stored(self, seq: int, message_id: bytes) -> None:
        subject = f"{DELETE_JOB}{stream_of_job(seq)}".encode()
        reply = (await request_until_answered(self._inbox, subject, b'{"seq":%d,"no_erase":true}' % seq))[0]
        error = orjson.loads(reply.data).get("error")
        if error is not None and await holds_job(self._inbox, seq, message_id):
            raise Unavailable(f"NATS cannot delete the job from the queue: {error}; retry shortly")

    # Events

    async def append_event(self, job: str, frame: bytes) -> None:
        """Publish; an event may be stored twice if its confirmation was lost."""
        subject = f"{EVENTS}.{require_token(job)}".encode()
        try:
            await store_message(self._inbox, subject, frame, max_payload=self._max_payload)
        except JetStreamError as error:
            raise Unavailable(f"NATS cannot store an event: {error}") from error

    def append_event_unconfirmed(self, job: str, frame: bytes) -> None:
        """Publish without a reply subject."""
        if len(frame) > self._max_payload:
            return  # NATS would close the connection
        with contextlib.suppress(Unavailable):
            self._connection.publish(f"{EVENTS}.{require_token(job)}".encode(), frame)

    async def first_events(self, job: str, count: int) -> list[StoredEvent]:
        """Read batches until there are enough events."""
        events: list[StoredEvent] = []
        left: int | None = None
        while is_token(job) and len(events) < count and left != 0:
            after = events[-1].seq if events else 0
            found, left = await self._events.batch(after + 1, f"{EVENTS}.{job}", count - len(events))
            events += [StoredEvent(message.seq, message.data, message.stored_at) for message in found]
        return events

    async def follow_events(self, job: str, after: int = 0) -> AsyncGenerator[StoredEvent | None, None]:
        self._require_open()
        reader = EventReader(self._connection, self._events, require_token(job), after)
        self._event_readers.add(reader)
        try:
            async with contextlib.aclosing(reader.events()) as events:
                async for event in events:
                    yield event
        finally:
            self._event_readers.discard(reader)

    def _require_open(self) -> None:
        if self._closed:
            raise Unavailable("the connection to NATS is closed")

    # Outcomes

    async def store_outcome(self, outcome: Outcome, payload: bytes = b"") -> bool:
        return await outcomes.store_outcome(self._inbox, outcome, payload, self._max_payload)

    async def read_outcome(self, job: str) -> StoredOutcome | None:
        """Read the only message on the job's subject."""
        message = await self._outcomes.last(f"{OUTCOMES}.{job}") if is_token(job) else None
        if message is None:
            return None
        try:
            outcome, payload = Outcome.decode(message.data)
        except ValueError:
            # It would block the job's subject forever, and so the job's end.
            log.warning("job_log.outcome_unreadable", job=job)
            await self.delete_outcome(job, message.seq)
            return None
        return StoredOutcome(outcome, payload, message.seq, message.stored_at)

    async def list_jobs(self) -> list[str]:
        """List the subjects of both streams."""
        outcome_subjects, events = await asyncio.gather(
            self._outcomes.subjects(f"{OUTCOMES}.>"), self._events.subjects(f"{EVENTS}.>")
        )
        jobs = {subject.removeprefix(f"{OUTCOMES}.") for subject in outcome_subjects}
        return sorted(jobs | {subject.removeprefix(f"{EVENTS}.") for subject in events})

    async def delete_outcome(self, job: str, seq: int) -> None:
        """Delete what the leader has under `seq`: a replica may have an earlier outcome."""
        message = await self._outcomes.from_leader({"seq": seq})
        if message is not None and message.subject == f"{OUTCOMES}.{job}":
            await self._outcomes.delete(seq)

    @asynccontextmanager
    async def watch_outcome(self, job: str) -> AsyncIterator[Callable[[float], Awaitable[bool]]]:
        """Wait for NATS's notification of a stored outcome; after a reconnect, read whether there is one."""
        subject = f"{STORED_OUTCOMES}.{require_token(job)}".encode()
        watch = _OutcomeWatch()
        self._outcome_watches.setdefault(subject, set()).add(watch)
        if not self._connection.connected:
            watch.changed.set()  # notifications may have been missed

        async def check_outcome() -> None:
            watch.changed.clear()
            try:
                if await self.read_outcome(job) is not None:
                    watch.stored.set()
            except BaseException as error:
                watch.changed.set()  # the outcome was not read: read it again
                if not isinstance(error, Unavailable):
                    raise

        async def wait(seconds: float) -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while not watch.stored.is_set():
                        await watch.changed.wait()
                        self._require_open()
                        if not watch.stored.is_set():
                            await check_outcome()
            return watch.stored.is_set()

        try:
            yield wait
        finally:
            watches = self._outcome_watches[subject]
            watches.discard(watch)
            if not watches:
                del self._outcome_watches[subject]

    def _on_ended(self, subject: bytes, _reply: bytes, _headers: bytes, _data: bytes) -> None:
        for watch in self._outcome_watches.get(subject, ()):
            watch.stored.set()
            watch.changed.set()

    def _recheck_outcomes(self) -> None:
        for watches in self._outcome_watches.values():
            for watch in watches:
                watch.changed.set()

    async def consume_outcomes(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        """Consume from the one consumer that all gateways share."""

        async def make(ack_wait_s: float) -> None:
            await ensure_pull_consumer(self._inbox, OUTCOMES_STREAM, OUTCOME_CONSUMER, ack_wait_s)

        async with contextlib.aclosing(
            self._take(OUTCOMES_STREAM, OUTCOME_CONSUMER, make, max_unacked, ack_wait_s)
        ) as items:
            async for item in items:
                yield item

    async def _take(
        self, stream: str, consumer: str, make: Make, max_unacked: int, ack_wait_s: float
    ) -> AsyncGenerator[WorkItem, None]:
        self._require_open()
        pull_consumer = PullConsumer(
            self._connection,
            self._inbox,
            stream=stream,
            consumer=consumer,
            make=make,
            max_unacked=max_unacked,
            ack_wait_s=ack_wait_s,
        )
        self._consumers.add(pull_consumer)
        try:
            async with contextlib.aclosing(pull_consumer.items()) as items:
                async for item in items:
                    yield item
        finally:
            self._consumers.discard(pull_consumer)

    # Gate requests

    async def serve_gate_requests(self, handler: GateRequestHandler) -> None:
        rpc_server = RpcServer(self._connection, handler)
        await rpc_server.start()
        self._rpc_servers.append(rpc_server)

    # Dead letters

    async def list_dead_letters(self, *, before: int | None = None, limit: int = 100) -> list[StoredDeadLetter]:
        return await self._dead_letters.newest(before, limit)

    async def find_dead_letter(self, job: str) -> StoredDeadLetter | None:
        return await self._dead_letters.find(job)

    async def delete_dead_letter(self, seq: int) -> bool:
        return await self._dead_letters.delete(seq)

    # Claims

    async def claim(self, name: str, value: bytes) -> bytes:
        """Publish with the condition that the name is free, or that its last value was deleted."""
        subject, expected = claim_subject(name), 0
        while True:
            try:
                await store_message(
                    self._inbox, subject.encode(), value, CREATE_ONLY % expected, max_payload=self._max_payload
                )
            except JetStreamError as error:
                if error.code not in WRONG_LAST_SEQUENCE:
                    raise Unavailable(f"NATS cannot store an idempotency claim: {error}") from error
            else:
                return value
            there = await self._claims.last(subject)
            if there is not None and there.header(b"KV-Operation") is None:
                return there.data
            # The claim was deleted by hand or has expired, or this replica lags behind the others.
            expected = there.seq if there is not None else 0
            await asyncio.sleep(CLAIM_RETRY_DELAY_S)

    # Content keys

    async def claim_content_key(self, job: str, value: bytes) -> bytes:
        """Publish with the condition that the job has no key. The bucket is created when it is first needed."""
        subject = f"$KV.{CONTENT_KEYS_BUCKET}.{require_token(job)}"
        if not self._has_content_keys:
            await ensure_content_keys(self._inbox, self._retention)
            self._has_content_keys = True
        try:
            await store_message(self._inbox, subject.encode(), value, CREATE_ONLY % 0, max_payload=self._max_payload)
        except JetStreamError as error:
            if error.code not in WRONG_LAST_SEQUENCE:
                raise Unavailable(f"NATS cannot store the content key of a job: {error}") from error
        else:
            return value
        there = await self._content_keys.from_leader({"last_by_subj": subject})
        if there is None:
            raise Unavailable("The content key of this job was deleted meanwhile. Retry shortly.")
        return there.data

    async def read_content_key(self, job: str) -> bytes | None:
        there = await self._content_keys.last(f"$KV.{CONTENT_KEYS_BUCKET}.{require_token(job)}")
        return None if there is None else there.data

    async def erase_content_key(self, job: str) -> None:
        there = await self._content_keys.from_leader(
            {"last_by_subj": f"$KV.{CONTENT_KEYS_BUCKET}.{require_token(job)}"}
        )
        if there is not None:
            await self._content_keys.erase(there.seq)

    # Work queues

    def work_queue(self, name: str) -> NatsWorkQueue:
        """Return the one object for this queue; its stream is created when it is first used."""
        work_queue = self._work_queues.get(name)
        if work_queue is None:
            work_queue = NatsWorkQueue(name, self._inbox, self._retention, self._take)
            self._work_queues[name] = work_queue
        return work_queue
