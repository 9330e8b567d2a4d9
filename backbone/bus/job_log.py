"""The seam of durable jobs: what is stored about them beside the queue.

| what | where | kept |
|---|---|---|
| events | `NEXUS_EVENTS` on `nexus.events.<job>`; oldest are dropped first when it is full | `Retention.events_s` |
| the terminal word | `NEXUS_DONE` on `nexus.done.<job>`: the first one wins; before it is full, the oldest that are recorded are dropped | `Retention.jobs_s` |
| dead letters | `NEXUS_DLQ` on `nexus.dlq.<capability>.<model>` | `Retention.dead_letters_s` |
| idempotency claims | key-value bucket `nexus-idempotency`, create-only | `Retention.claims_s` |
| backlogs: work of the gateways themselves | `NEXUS_<NAME>` on `nexus.<name>.<id>`, work queues | until done |

Guarantees, for every implementation:
- What a call has stored when it returns survives the death of every process. A call that raises Unavailable may have been
  done all the same; to repeat it changes nothing.
- Of several words on one job exactly one is kept, the first; `decide` tells each caller whether it was theirs.
- Events of one job come in the order in which they were stored, and are told to whoever follows as soon as they are.
- An item of a backlog, and a terminal word, is taken by one gateway at a time, and comes again until it is settled.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from backbone.bus.bus import Queue
from backbone.bus.seals import SealSecret
from schemas.job_events import GateReply, GateRequest
from schemas.jobs import Envelope
from schemas.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Retention:
    """How long things are kept, in seconds, and how much room they have, in bytes."""

    jobs_s: float = 7 * 86_400.0
    events_s: float = 86_400.0
    dead_letters_s: float = 30 * 86_400.0
    claims_s: float = 86_400.0
    max_event_bytes: int = 4 * 1024**3
    max_outcome_bytes: int = 4 * 1024**3
    max_dead_letter_bytes: int = 1024**3
    replicas: int = 1


class StoredEvent(NamedTuple):
    """One event as it is stored."""

    seq: int
    """In the stream of events: grows with time, not by one."""
    data: bytes
    """See `schemas.job_events`."""
    stored_at: int | None = None
    """Unix seconds, by NATS's clock; None where it came as it was stored."""


class StoredOutcome(NamedTuple):
    """How a job ended."""

    outcome: Outcome
    payload: bytes
    seq: int
    """In the stream of words."""
    stored_at: int
    """Unix seconds, by NATS's clock."""


class StoredDeadLetter(NamedTuple):
    """A job that ended among the dead letters."""

    seq: int
    """Its id within the stream: the newest is the greatest."""
    outcome: Outcome
    message: bytes
    """The job message: `Envelope.decode` takes it apart."""
    stored_at: int
    """Unix seconds, by NATS's clock."""


class WorkItem(Protocol):
    """Something taken from a backlog. Settle it by `done` or `again`; unsettled it comes again after `ack_wait_s`."""

    id: str
    """What stands after `nexus.<name>.` in its subject."""
    data: bytes
    delivery: int
    """1 for the first time it is taken."""
    stored_at: int
    """Unix seconds, by NATS's clock."""

    async def ack(self) -> None:
        """Forget it: confirmed when this returns. Raises Unavailable."""

    def nak(self, delay_s: float) -> None:
        """Let it come again, to any gateway, after `delay_s`."""

    def extend(self) -> None:
        """It is still worked on: `ack_wait_s` begins anew."""


class WorkQueue(Protocol):
    """One backlog of the gateways' own work, shared by all of them."""

    async def put(self, item_id: str, data: bytes) -> None:
        """Store an item, once per id within two minutes. Raises Unavailable."""

    def consume(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        """Items as they come, at most `max_unacked` unsettled by this taker. Never ends by itself, survives outages; close it."""


class JobLog(Protocol):
    """The gateway's side."""

    @property
    def seal_secret(self) -> SealSecret | None:
        """The secret that gateways share, once `start` has read it."""

    async def start(self) -> None:
        """Connect, and make streams and buckets, also anew after a reconnect to a server without them. Raises Unavailable."""

    async def close(self) -> None:
        """Disconnect; whoever follows or takes gets Unavailable."""

    # The queue

    async def enqueue(self, envelope: Envelope, body: bytes) -> int:
        """Put a job into its queue, once per (job, run) within the duplicate window; its sequence, once it is on disk.

        Repeats by itself for a while. Raises QueueFull, RequestTooLarge, Unavailable.
        """

    async def queue_position(self, queue: Queue, seq: int) -> int | None:
        """How many jobs of `queue` wait before the one stored under `seq`, those that run not counted. None: it is not
        there any more. Raises Unavailable.
        """

    async def delete_job(self, seq: int, job: str, run: int) -> None:
        """Delete a stored job from the queue, also one that a worker runs. Return once it is gone for certain.

        Another job under this sequence, as after a loss of data, stays. Raises Unavailable.
        """

    # Events

    async def append_event(self, job: str, frame: bytes) -> None:
        """Store an event. Raises Unavailable."""

    def append_event_unconfirmed(self, job: str, frame: bytes) -> None:
        """Store an event soon, if all goes well: nobody waits for it."""

    async def first_events(self, job: str, count: int) -> list[StoredEvent]:
        """The first `count` events that are kept of a job. Raises Unavailable."""

    def follow_events(self, job: str, after: int = 0) -> AsyncGenerator[StoredEvent | None, None]:
        """Events stored after sequence `after`, then those to come. None: there are no more for now, or the job was
        decided meanwhile: whoever reads may look, and go on. Never ends by itself; close it. Raises Unavailable.
        """

    # Terminal words

    async def store_outcome(self, outcome: Outcome, payload: bytes = b"") -> bool:
        """End a job. True: this word is the first and is kept. False: it was decided before. Raises Unavailable."""

    async def read_outcome(self, job: str) -> StoredOutcome | None:
        """How it ended; None: it has not, or that is not kept any more. Raises Unavailable."""

    async def list_jobs(self) -> list[str]:
        """The jobs of which an event or a terminal word is kept, in the order of their ids. Raises Unavailable."""

    async def delete_outcome(self, job: str, seq: int) -> None:
        """Take a word back, for a new run: only the one stored under `seq`. Idempotent. Raises Unavailable."""

    def watch_outcome(self, job: str) -> AbstractAsyncContextManager[Callable[[float], Awaitable[bool]]]:
        """Inside, `await wait(seconds)` returns True once a word on this job is stored after entry, False when the time
        is up. It never asks again and again: it is told.
        """

    def consume_outcomes(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        """Every terminal word, each to one gateway (`WorkItem.data` decodes by `Outcome.decode`). Like `WorkQueue.take`."""

    # Questions of workers

    async def serve_gate_requests(self, handler: Callable[[GateRequest], Awaitable[GateReply | None]]) -> None:
        """From now on, share in answering what workers ask. None: no answer is wanted. `referee` must not raise."""

    # Dead letters

    async def list_dead_letters(self, *, before: int | None = None, limit: int = 100) -> list[StoredDeadLetter]:
        """The newest dead letters, with sequences below `before`, newest first. Raises Unavailable."""

    async def find_dead_letter(self, job: str) -> StoredDeadLetter | None:
        """The newest one of this job. Raises Unavailable."""

    async def delete_dead_letter(self, seq: int) -> bool:
        """Delete a dead letter. False: it was not there. Raises Unavailable."""

    # Claims

    async def claim(self, name: str, value: bytes) -> bytes:
        """Store `value` under `name` if nothing is there; what is there now: `value` itself, or what came first.

        `name` is of `[A-Za-z0-9_-]`. Raises Unavailable.
        """

    # Backlogs

    def work_queue(self, name: str) -> WorkQueue:
        """The backlog of that name: `hooks`, `batches`."""


class WorkerLog(Protocol):
    """The worker's side. It stores; it reads nothing."""

    async def start(self) -> None:
        """Connect. Raises Unavailable."""

    async def close(self) -> None:
        """Disconnect. What is unconfirmed may be lost."""

    def event_writer(self, job: str) -> EventWriter:
        """Begin to store events of one attempt."""

    def request_gate(self, ask: GateRequest, on_answer: Callable[[GateReply | None], None]) -> None:
        """Ask the gateways. `on_answer(None)`: none of them is there, or it did not answer within five seconds.
        RETURNED is told, and not answered.
        """

    async def store_outcome(self, outcome: Outcome, payload: bytes) -> bool:
        """As JobLog's. Raises Unavailable when NATS did not confirm it for now: repeat it."""

    async def store_dead_letter(self, outcome: Outcome, message: bytes) -> None:
        """Store a dead letter, once per (job, run) within two minutes. Raises Unavailable."""


class EventWriter(Protocol):
    """Stores the events of one attempt, in order, over outages; a frame may be stored twice, never out of order by intent."""

    def append(self, frame: bytes) -> None:
        """Queue an event."""

    @property
    def is_full(self) -> bool:
        """So much is unconfirmed that `settle` should be awaited before more is said."""

    async def flush(self) -> None:
        """Return when everything said is stored. Goes on for ever while NATS is away: bound it. Raises Unavailable when it
        was closed before that.
        """

    def close(self) -> None:
        """Forget what is unconfirmed."""
