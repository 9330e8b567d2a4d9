"""The protocols of durable jobs: the data that is stored about a job beside the queue.

| data | place | kept for |
|---|---|---|
| events | `NEXUS_EVENTS` on `nexus.events.<job>`; a full stream drops the oldest | `Retention.events_s` |
| outcomes | `NEXUS_DONE` on `nexus.done.<job>`: the first wins; before the stream is full, the oldest recorded outcomes are dropped | `Retention.jobs_s` |
| dead letters | `NEXUS_DLQ` on `nexus.dlq.<capability>.<model>` | `Retention.dead_letters_s` |
| idempotency claims | key-value bucket `nexus-idempotency`, create-only | `Retention.claims_s` |
| the gateways' own work | `NEXUS_<NAME>` on `nexus.<name>.<id>`, work queues | until it is done |

Guarantees of every implementation:
- Data that a call has stored when it returns survives the death of every process. A call that raises Unavailable may have
  stored its data all the same; repeating it changes nothing.
- Of several outcomes of one job exactly one is stored, the first; `store_outcome` tells each caller whether it was the first.
- Events of one job are read in the order in which they were stored, and reach a reader as soon as they are stored.
- A work item or an outcome is delivered to one gateway at a time, and again until it is settled.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from backbone.bus.bus import Queue
from backbone.bus.seals import SealSecret
from schemas.errors import Unavailable
from schemas.job_events import GateReply, GateRequest
from schemas.jobs import Envelope
from schemas.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Retention:
    """Lifetimes, in seconds, and limits, in bytes."""

    jobs_s: float = 7 * 86_400.0
    events_s: float = 86_400.0
    dead_letters_s: float = 30 * 86_400.0
    claims_s: float = 86_400.0
    max_event_bytes: int = 4 * 1024**3
    max_outcome_bytes: int = 4 * 1024**3
    max_dead_letter_bytes: int = 1024**3
    usage_s: float = 30 * 86_400.0
    max_usage_bytes: int = 512 * 1024**2
    max_audit_bytes: int = 256 * 1024**2
    replicas: int = 1


class StoredEvent(NamedTuple):
    """An event as it is stored."""

    seq: int
    """The sequence in the stream of events: it grows over time, but not by one."""
    data: bytes
    """The frame; see `schemas.job_events`."""
    stored_at: int | None = None
    """Unix seconds, by NATS's clock; None for an event that was received while it was stored."""


class StoredOutcome(NamedTuple):
    """How a job ended."""

    outcome: Outcome
    payload: bytes
    seq: int
    """The sequence in the stream of outcomes."""
    stored_at: int
    """Unix seconds, by NATS's clock."""
    is_forgotten: bool = False
    """The job's content cannot be read any more: `payload` is empty."""


class StoredDeadLetter(NamedTuple):
    """A job that failed for good, with the message to run it again."""

    seq: int
    """The sequence in the stream of dead letters: the newest has the greatest."""
    outcome: Outcome
    message: bytes
    """The job message; `Envelope.decode` decodes it."""
    stored_at: int
    """Unix seconds, by NATS's clock."""


class WorkItem(Protocol):
    """An item that was delivered from a work queue. `ack` or `nak` settles it; an unsettled item is delivered again after
    `ack_wait_s`.
    """

    id: str
    """The part of its subject after `nexus.<name>.`."""
    data: bytes
    delivery: int
    """1 for the first delivery."""
    stored_at: int
    """Unix seconds, by NATS's clock."""

    async def ack(self) -> None:
        """Remove the item from the queue; it is removed when this returns. Raises Unavailable."""

    def nak(self, delay_s: float) -> None:
        """Return the item to the queue; any gateway may get it after `delay_s` seconds."""

    def extend(self) -> None:
        """Renew `ack_wait_s`: the gateway still works on the item."""


class WorkQueueFull(Unavailable):
    """The queue of the gateways' own work has reached its limit, and accepts no item."""


class WorkQueue(Protocol):
    """A queue of the gateways' own work, shared by all gateways."""

    async def put(self, item_id: str, data: bytes) -> None:
        """Store an item, once per id within two minutes. Raises Unavailable, WorkQueueFull where the queue accepts no more."""

    def consume(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        """Yield items as they arrive, at most `max_unacked` of them unsettled. Never ends by itself and survives outages; close
        it.
        """

    async def oldest(self) -> int | None:
        """Return when the oldest item that is not acknowledged was stored, in Unix seconds; None: there is none. Raises Unavailable."""


class JobQueue(Protocol):
    """The queue of durable jobs."""

    async def enqueue(self, envelope: Envelope, body: bytes, *, replaces: int = 0) -> int:
        """Store a job in its queue, once per (job, run) within the duplicate window, and return its sequence once it is on
        disk. `replaces`: the sequence of the same run's message that this one is to replace, which the caller deletes afterwards.

        Retries by itself for a while. Raises QueueFull, RequestTooLarge, Unavailable.
        """

    async def queue_position(self, queue: Queue, seq: int) -> int | None:
        """Return how many waiting jobs of `queue` start before the job under `seq`; running jobs do not count. None: the job is
        not in the queue any more. Raises Unavailable.
        """

    async def read_job(self, seq: int, job: str, run: int) -> bytes | None:
        """Return the message of a stored job; None: no message of this run is under this sequence. Raises Unavailable."""

    async def delete_job(self, queue: Queue, seq: int, job: str, run: int) -> None:
        """Delete a stored job from its queue, also one that a worker runs. Return once the queue no longer holds it.

        A job that has moved from a backlog since is found. Another job under this sequence, as after a loss of data, stays. Raises
        Unavailable.
        """


class EventLog(Protocol):
    """The events of jobs."""

    async def append_event(self, job: str, frame: bytes) -> None:
        """Store an event. Raises Unavailable."""

    def append_event_unconfirmed(self, job: str, frame: bytes) -> None:
        """Store an event without waiting for the confirmation. Best effort."""

    async def first_events(self, job: str, count: int) -> list[StoredEvent]:
        """Return the first `count` stored events of a job. Raises Unavailable."""

    def follow_events(self, job: str, after: int = 0) -> AsyncGenerator[StoredEvent | None, None]:
        """Yield the events after sequence `after`, then those that are stored later. None: there are no more events for now, or
        the outcome was stored meanwhile; the reader may check and go on. Never ends by itself; close it. Raises Unavailable.
        """


class OutcomeStore(Protocol):
    """How jobs ended."""

    async def store_outcome(self, outcome: Outcome, payload: bytes = b"") -> bool:
        """Store how a job ended. True: this outcome is the first and is stored. False: the job has an outcome already. Raises
        Unavailable.
        """

    async def read_outcome(self, job: str) -> StoredOutcome | None:
        """Return how the job ended; None: it has not ended, or its outcome is not stored any more. Raises Unavailable."""

    async def list_jobs(self) -> list[str]:
        """Return the ids of the jobs with a stored event or outcome, sorted. Raises Unavailable."""

    async def delete_outcome(self, job: str, seq: int) -> None:
        """Delete the outcome that is stored under `seq`, for a new run. Idempotent. Raises Unavailable."""

    def watch_outcome(self, job: str) -> AbstractAsyncContextManager[Callable[[float], Awaitable[bool]]]:
        """Watch a job for its outcome. Inside the block, `await wait(seconds)` returns True once an outcome is stored after
        entry, and False when the time is up. NATS notifies the watch; it does not poll.
        """

    def consume_outcomes(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        """Yield every outcome, each to one gateway (`Outcome.decode` decodes `WorkItem.data`). Otherwise like
        `WorkQueue.consume`.
        """


class GateRequestServer(Protocol):
    """The workers' requests to the attempt gate."""

    async def serve_gate_requests(self, handler: Callable[[GateRequest], Awaitable[GateReply | None]]) -> None:
        """Answer the workers' gate requests from now on, in turn with the other gateways. `handler` must not raise; None sends
        no reply.
        """


class DeadLetterStore(Protocol):
    """Jobs that failed for good."""

    async def list_dead_letters(self, *, before: int | None = None, limit: int = 100) -> list[StoredDeadLetter]:
        """Return the newest dead letters with sequences below `before`, newest first. Raises Unavailable."""

    async def find_dead_letter(self, job: str) -> StoredDeadLetter | None:
        """Return the newest dead letter of this job. Raises Unavailable."""

    async def delete_dead_letter(self, seq: int) -> bool:
        """Delete a dead letter. False: it did not exist. Raises Unavailable."""


class IdempotencyClaims(Protocol):
    """Names that were claimed once, for idempotency keys."""

    async def claim(self, name: str, value: bytes) -> bytes:
        """Store `value` under `name` if the name is free, and return the stored value: `value` itself, or the one that was
        stored first.

        `name` consists of `[A-Za-z0-9_-]`. Raises Unavailable.
        """


class ContentKeyLog(Protocol):
    """Stores the content keys of jobs. What they are for: `backbone.bus.content_keys`."""

    async def claim_content_key(self, job: str, value: bytes) -> bytes:
        """Store `value` for a job that has none, and return the stored value, which may be an earlier one. Raises Unavailable."""

    async def read_content_key(self, job: str) -> bytes | None:
        """Return the value of a job; None: it has none. Raises Unavailable."""

    async def erase_content_key(self, job: str) -> None:
        """Delete the value of a job, and overwrite its bytes on the disk. Idempotent. Raises Unavailable."""


class WorkQueues(Protocol):
    """The queues of the gateways' own work."""

    def work_queue(self, name: str) -> WorkQueue:
        """Return the work queue of that name: `hooks`, `batches`, `usage` or `audit`."""


class JobHistory(EventLog, OutcomeStore, Protocol):
    """The events of jobs, and how jobs ended."""


class JobStorage(JobQueue, JobHistory, Protocol):
    """The queue of durable jobs, their events, and how they ended."""


class JobLog(JobStorage, GateRequestServer, DeadLetterStore, IdempotencyClaims, ContentKeyLog, WorkQueues, Protocol):
    """The gateway's side of durable jobs. Its parts are protocols of their own, so that each user names what it needs."""

    @property
    def seal_secret(self) -> SealSecret | None:
        """The secret that the gateways share, once `start` has read it."""

    async def start(self) -> None:
        """Connect, and create streams and buckets, also after a reconnect to a server that lost them. Raises Unavailable."""

    async def close(self) -> None:
        """Disconnect. Open readers and consumers raise Unavailable."""


class WorkerLog(Protocol):
    """The worker's side of durable jobs: it stores and reads nothing."""

    async def start(self) -> None:
        """Connect. Raises Unavailable."""

    async def close(self) -> None:
        """Disconnect. Unconfirmed events may be lost."""

    def event_writer(self, job: str) -> EventWriter:
        """Return a writer for the events of one attempt."""

    def request_gate(self, request: GateRequest, on_answer: Callable[[GateReply | None], None]) -> None:
        """Send a gate request to the gateways. `on_answer(None)`: no gateway is there, or none answered within five seconds. A
        RETURNED request gets no reply.
        """

    async def store_outcome(self, outcome: Outcome, payload: bytes) -> bool:
        """Store an outcome as `JobLog.store_outcome` does. Raises Unavailable when NATS has not confirmed it: call it again."""

    async def store_dead_letter(self, outcome: Outcome, message: bytes) -> None:
        """Store a dead letter, once per (job, run) within two minutes. Raises Unavailable."""


class EventWriter(Protocol):
    """Stores the events of one attempt, in order, over outages. A frame may be stored twice."""

    def append(self, frame: bytes) -> None:
        """Store an event soon."""

    @property
    def is_full(self) -> bool:
        """Whether so many events are unconfirmed that the caller should await `flush` before it appends more."""

    async def flush(self) -> None:
        """Return when every appended event is stored. Waits forever while NATS is away: bound it. Raises Unavailable when the
        writer was closed before that.
        """

    def close(self) -> None:
        """Drop the unconfirmed events."""
