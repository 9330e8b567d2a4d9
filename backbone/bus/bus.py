"""The bus protocols: how jobs reach workers, and how events come back to gateways.

A gateway submits jobs and receives events through `GatewayBus`; a worker pulls jobs and sends events through `WorkerBus`. Both
call back on one event loop: a callback must return at once and must not raise.

Guarantees of every implementation:
- A job is stored once per (job, run): submitting it again within the duplicate window changes nothing.
- `ReplyListener.on_stored` is called once the job is durable, or `ReplyListener.on_refused` once it is certain that the job is
  not and will not be stored.
- A pulled job belongs to the worker for `ack_wait` seconds, which `extend` renews. After that time the job goes to another
  worker with a higher `delivery` number, and `ack`, `nak` and `extend` of the first worker do nothing, since they would hit the
  other worker's run.
- Jobs of one queue and owner are delivered in the order in which they were stored. Owners whose jobs wait get shares of the
  slots' time by their weights (`backbone.bus.fair_share`); one that waits alone gets all of it.
- `pull` yields at most `batch` jobs. `on_end` reports the jobs that a pull did not bring, once the pull is over. While a pull
  with `wait_s` is open on a queue, no pull without `wait_s` may be made there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from schemas.errors import NexusError
from schemas.jobs import Capability, Envelope, Lane

if TYPE_CHECKING:
    from backbone.bus.queue_listing import QueuePage

MAX_FRESH_AGE_S = 0.25
"""A job that is delivered within this time after it was stored has not waited for a slot."""


class Queue(NamedTuple):
    """The jobs of one capability, lane and model, in order."""

    capability: Capability
    lane: Lane
    model: str


class QueueChange(StrEnum):
    """What happened to a queue."""

    MADE = "made"
    FREED = "freed"
    """No worker serves the model any more, and the queue was empty."""
    REFUSED = "refused"
    """NATS does not allow one more queue."""
    RESTORED = "restored"
    """The queue held a job, but had no consumer to pull from."""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """The number of jobs in a queue."""

    queue: Queue
    waiting: int
    """Jobs that are stored and not with a worker."""
    in_progress: int
    """Jobs that a worker runs."""
    backlogged: int = 0
    """The waiting jobs that are in backlogs of their owners."""
    next_seq: int = 1
    """Every other waiting job has this sequence or a higher one."""


@dataclass(frozen=True, slots=True)
class StreamUsage:
    """The size of a stream, and its limit."""

    stream: str
    messages: int
    bytes: int
    max_bytes: int | None
    """None: the disk is the only limit."""


@dataclass(frozen=True, slots=True)
class StorageUsage:
    """The sizes of all streams."""

    streams: tuple[StreamUsage, ...]
    """The streams that exist."""
    unrecorded: int
    """Outcomes of durable jobs that no gateway has recorded yet."""


class ReplyListener(Protocol):
    """The part of a gateway that waits for a submitted job."""

    @property
    def is_waiting(self) -> bool:
        """Whether no attempt is known to live: the job is in its queue, on its way to the next worker, or lost."""

    @property
    def started_at(self) -> float | None:
        """When the job's first attempt started, in monotonic seconds; None: no attempt is known."""

    def on_stored(self, seq: int) -> None:
        """Learn that the job is durable, under this sequence; again, when it waits under another one."""

    def on_refused(self, error: NexusError) -> None:
        """Learn that the job could not be stored, or was lost. No event of the job follows."""

    def on_event(self, data: bytes) -> bytes | None:
        """Receive an event frame (see schemas.frames). A returned frame is sent as the reply to a frame that was sent as a
        request.
        """


class GatewayBus(Protocol):
    """The gateway's side of the bus."""

    async def start(self) -> None:
        """Connect, and create the streams. Raises Unavailable."""

    async def close(self) -> None:
        """Disconnect."""

    @property
    def connected(self) -> bool:
        """Whether the connection stands now."""

    @property
    def max_message_bytes(self) -> int:
        """The size of the largest job message, in bytes."""

    async def open_queue(self, queue: Queue) -> None:
        """Create the queue if it does not exist. Raises Unavailable, at once where NATS allows no more queues."""

    async def apply_holds(self, is_held: Callable[[str], bool]) -> None:
        """Hold the queues of the models for which this is true, from now on also those that are created later; release all others.

        NATS delivers no waiting job of a held queue, whichever worker asks. Raises Unavailable; repeat it then.
        """

    async def free_queues(self, is_served: Callable[[Queue], bool], grace_s: float) -> int:
        """Delete the empty queues that `is_served` has denied for `grace_s` seconds, and return their number. Raises
        Unavailable.

        A job that is submitted meanwhile is served all the same: its queue is created again.
        """

    def is_queue_refused(self, queue: Queue) -> bool:
        """Return whether the queue does not exist and NATS allows no more queues."""

    @property
    def queues_are_full(self) -> bool:
        """Whether NATS allows no more queues."""

    @property
    def queue_count(self) -> int:
        """The number of queues that this process knows."""

    def new_reply_subject(self) -> str:
        """Return a new, unguessable subject on which this process receives events."""

    def submit(self, envelope: Envelope, body: bytes, listener: ReplyListener, line: bytes = b"") -> None:
        """Store a job; what arrives on `envelope.reply` goes to `listener`. Raises Unavailable, RequestTooLarge.

        `line`: the envelope's line of the message, where it is known.
        The first job of a queue creates it; if that fails, `listener.on_refused` is called.
        """

    def release(self, reply: str) -> None:
        """Stop listening for one job. Later requests on `reply` are answered with GONE."""

    def delete_job(self, seq: int) -> None:
        """Delete a stored job if no worker has it yet. Best effort."""

    async def queue_position(self, queue: Queue, seq: int) -> int | None:
        """Return how many waiting jobs of `queue` start before the job under `seq`. None: the job does not wait. Raises
        Unavailable.
        """

    def record_start(self, queue: Queue) -> None:
        """Note that a durable job of the queue has started: the next one may come."""

    def record_use(self, queue: Queue, owner: str, seconds: float) -> None:
        """Note that a durable job of the owner has held a slot for so many seconds, which count against its share."""

    def on_job_moved(self, moved: Callable[[str, int, str, int], None]) -> None:
        """Call `moved(job, run, owner, seq)` when a durable job gets another sequence."""

    def send_control(self, worker: str, message: bytes) -> None:
        """Send a message to a worker (see schemas.control). Best effort; an invalid worker name is refused and counted."""

    def listen(self, reply: str, on_message: Callable[[bytes], None]) -> None:
        """Receive what arrives on a new reply subject, until `release`."""

    def send_reply(self, reply: str, message: bytes) -> None:
        """Send a message to a reply subject of any gateway. Best effort; another subject is refused and counted."""

    def send_to_gateways(self, topic: str, message: bytes) -> None:
        """Send a message to every gateway, this one included. A topic is one token of `[a-z-]`. Best effort."""

    async def subscribe_gateways(self, topic: str, on_message: Callable[[bytes], None]) -> None:
        """Receive the `send_to_gateways` messages of a topic. Raises Unavailable."""

    async def queue_depths(self) -> list[QueueDepth]:
        """Return the depth of every queue that holds jobs. Raises Unavailable."""

    async def oldest_queued_at(self, depth: QueueDepth) -> int | None:
        """Return when the job was stored that has waited longest in a queue, in Unix seconds. None: none waits any more.

        It reads up to two jobs. Raises Unavailable.
        """

    async def list_jobs(self, model: str, after: str, limit: int) -> QueuePage:
        """Return up to `limit` jobs of a model that wait, in the order in which they will start, after a cursor (empty: the first).

        Jobs that start meanwhile may be missing, and none is listed twice. Raises Unavailable; ValueError for an unknown cursor.
        """

    async def storage_usage(self) -> StorageUsage:
        """Return the sizes of all streams. Raises Unavailable."""

    async def dead_letter_counts(self) -> dict[str, int]:
        """Return how many dead letters each model has that has any. Raises Unavailable."""

    async def ping(self) -> None:
        """Make one round trip to the jobs stream. Raises Unavailable."""

    async def server_time_s(self) -> float:
        """Return the time of the server that stores the jobs, in Unix seconds. Raises Unavailable."""


class JobDelivery(Protocol):
    """A job that was delivered to a worker."""

    queue: Queue
    message: bytes
    delivery: int
    """1 for the first delivery of this message."""
    pending: int
    """Jobs that were left in the queue when this one was pulled."""
    age_s: float
    """The longest time, in seconds, for which the job can have been stored."""
    fresh: bool
    """The job was stored within the last MAX_FRESH_AGE_S and never delivered before. False where that is not known."""

    @property
    def owned(self) -> bool:
        """Whether the job still belongs to this worker: it is not settled, and `ack_wait` has not passed."""

    def ack(self) -> None:
        """Acknowledge the job: it is done and leaves the queue."""

    def nak(self, delay_s: float = 0.0) -> None:
        """Return the job to the queue; another worker may get it after `delay_s` seconds."""

    def extend(self) -> None:
        """Renew `ack_wait`: the job still runs."""


class WorkerBus(Protocol):
    """The worker's side of the bus."""

    async def start(self) -> None:
        """Connect. Raises Unavailable."""

    async def close(self) -> None:
        """Flush and disconnect. Unsettled jobs return to their queues after `ack_wait`."""

    @property
    def connected(self) -> bool:
        """Whether the connection stands now."""

    async def serve(
        self,
        queues: list[Queue],
        on_wakeup: Callable[[Queue], None] | None,
        on_recheck: Callable[[Queue], None] | None = None,
    ) -> None:
        """Prepare to pull from these queues, which replace those of the last call. Jobs go to the `on_job` that the bus was
        created with.

        `on_wakeup` is called when a job is stored; `on_recheck`, about once a second, for a queue that may hold a job without a
        wake-up notification: a job that was returned, or was stored while the queue did not exist. Both are best effort. A
        queue need not exist: a pull from it ends at once, and the first job creates it before the workers are notified.
        """

    async def set_muted(self, queue: Queue, *, muted: bool) -> None:
        """Mute or unmute the wake-up notifications of one queue, in effect for what is pulled after this call."""

    def pull(self, queue: Queue, batch: int, wait_s: float, on_end: Callable[[Queue, int], None]) -> None:
        """Pull up to `batch` jobs, which go to `on_job`; with `wait_s` 0, only jobs that wait now.

        `on_end(queue, unused)` reports the number of jobs that the pull did not bring; a full pull does not call it.
        """

    async def stop_pulling(self) -> None:
        """End every pull. Jobs that were on their way have reached `on_job` when this returns."""

    def send_event(self, reply: str, frame: bytes, *, may_wait: bool = False) -> None:
        """Send an event. The order is kept; delivery is at most once. An event that `may_wait` is sent within milliseconds, together
        with others, where the worker sends many.
        """

    def request(self, reply: str, frame: bytes, on_answer: Callable[[bytes | None], None]) -> int:
        """Send an event as a request, and return a ticket for `cancel_request`. `on_answer(None)`: nobody listens on the
        subject.
        """

    def cancel_request(self, ticket: int) -> None:
        """Drop the reply to a request. Idempotent."""

    async def subscribe_control(self, worker: str, on_control: Callable[[bytes], None]) -> None:
        """Receive the `GatewayBus.send_control` messages for this worker."""

    async def ping(self) -> None:
        """Make one round trip. Raises Unavailable."""
