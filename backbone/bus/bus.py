"""The bus seam: how jobs reach workers and how events come back.

Two sides, two protocols: `GatewayBus` submits jobs and hears events, `WorkerBus` pulls jobs and says events. Both are
callback-driven on one event loop: a callback must return at once and must not raise.

Guarantees, for every implementation:
- A job is stored once per (job, run): a repeated submit within the duplicate window changes nothing.
- `ReplyListener.stored` comes once the job is durable. `ReplyListener.refused` comes instead when it is not and will not be.
- A pulled job belongs to the worker for `ack_wait` seconds, renewed by `extend`; then it goes to another one, with a
  higher `delivery` number. `ack`, `give_back` and `extend` after that do nothing (they would hit the other's run).
- Jobs of one subject are delivered in the order they were stored.
- `pull` never yields more than `batch` jobs. Those it does not bring are told by `on_end`, once the pull is over.
  While a pull with `wait_s` is open on a queue, no pull without it may be made there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from schemas.errors import NexusError
from schemas.jobs import Capability, Envelope, Lane

MAX_FRESH_AGE_S = 0.02
"""A job that is delivered within this has not waited for a slot."""


class Queue(NamedTuple):
    """One line of jobs."""

    capability: Capability
    lane: Lane
    model: str


class QueueChange(StrEnum):
    """What happens to a queue."""

    MADE = "made"
    FREED = "freed"
    """Its model is gone, and it was empty."""
    REFUSED = "refused"
    """There is no room for one more."""
    RESTORED = "restored"
    """It held a job, and could not be pulled from."""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How many jobs a queue holds."""

    queue: Queue
    waiting: int
    """Stored, and not with a worker."""
    in_progress: int
    """With a worker."""


@dataclass(frozen=True, slots=True)
class StreamUsage:
    """What a stream holds, and what it may."""

    stream: str
    messages: int
    bytes: int
    max_bytes: int | None
    """None: as much as there is disk."""


@dataclass(frozen=True, slots=True)
class StorageUsage:
    """How full the streams are."""

    streams: tuple[StreamUsage, ...]
    """Those that exist."""
    unrecorded: int
    """Ends of durable jobs that no gateway has recorded yet."""


class ReplyListener(Protocol):
    """Who waits for a submitted job."""

    @property
    def is_waiting(self) -> bool:
        """No attempt is known that lives: the job is in its queue, on its way to the next worker, or lost."""

    def on_stored(self, seq: int) -> None:
        """The job is durable, under this sequence."""

    def on_refused(self, error: NexusError) -> None:
        """The job could not be stored, or was lost: no event of it will come any more."""

    def on_event(self, data: bytes) -> bytes | None:
        """An event frame (see schemas.frames). What is returned, if anything, answers a frame sent as a question."""


class GatewayBus(Protocol):
    """The gateway's side."""

    async def start(self) -> None:
        """Connect and make the streams. Raises Unavailable."""

    async def close(self) -> None:
        """Disconnect."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""

    @property
    def max_message_bytes(self) -> int:
        """The largest job message."""

    async def open_queue(self, queue: Queue) -> None:
        """Make the queue, where it is not there. Raises Unavailable, at once where there is no room for one more."""

    async def free_queues(self, is_served: Callable[[Queue], bool], grace_s: float) -> int:
        """Free the empty queues that `is_served` has denied for `grace_s`, and return how many. Raises Unavailable.

        A job that is submitted meanwhile is served all the same: its queue is made again.
        """

    def is_queue_refused(self, queue: Queue) -> bool:
        """Whether the queue is not there, and there is no room for one more."""

    @property
    def queues_are_full(self) -> bool:
        """Whether there is no room for one more queue."""

    @property
    def queue_count(self) -> int:
        """How many queues there are, as far as this process knows."""

    def new_reply_subject(self) -> str:
        """An unguessable subject on which this process hears events."""

    def submit(self, envelope: Envelope, body: bytes, listener: ReplyListener) -> None:
        """Store a job; what comes on `envelope.reply` goes to `sink`. Raises Unavailable, RequestTooLarge.

        The first job of a queue makes it; where that fails, `sink` is refused.
        """

    def release(self, reply: str) -> None:
        """Stop listening for one job. Questions that still come on `reply` are answered GONE."""

    def delete_job(self, seq: int) -> None:
        """Delete a stored job, if nobody has it yet. Best effort."""

    def send_control(self, worker: str, message: bytes) -> None:
        """Say something to a worker (see schemas.control). Best effort. A name that cannot be a worker's is refused."""

    async def queue_depths(self) -> list[QueueDepth]:
        """Every queue with anything in it. Raises Unavailable."""

    async def storage_usage(self) -> StorageUsage:
        """How full the streams are. Raises Unavailable."""

    async def ping(self) -> None:
        """One active round trip to the jobs stream. Raises Unavailable."""

    async def server_time_s(self) -> float:
        """The time of the server that stores the jobs, in Unix seconds. Raises Unavailable."""


class JobDelivery(Protocol):
    """A job in a worker's hands."""

    queue: Queue
    message: bytes
    delivery: int
    """1 for the first delivery of this message."""
    pending: int
    """Jobs left in the queue when this one was taken."""
    age_s: float
    """How long ago it was stored, at most, as far as is known."""
    fresh: bool
    """It was stored within the last FRESH_S, and nobody has had it before. False where that is not known."""

    @property
    def owned(self) -> bool:
        """Still ours: neither settled nor past `ack_wait`."""

    def ack(self) -> None:
        """The job is done: forget it."""

    def nak(self, delay_s: float = 0.0) -> None:
        """Let somebody else have it, after `delay_s`."""

    def extend(self) -> None:
        """It is still running."""


class WorkerBus(Protocol):
    """The worker's side."""

    async def start(self) -> None:
        """Connect. Raises Unavailable."""

    async def close(self) -> None:
        """Flush and disconnect. Jobs still in hand come back to the queue after `ack_wait`."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""

    async def serve(
        self,
        queues: list[Queue],
        on_wakeup: Callable[[Queue], None] | None,
        on_recheck: Callable[[Queue], None] | None = None,
    ) -> None:
        """Be ready to pull from these queues, replacing those of the last call. Jobs go to the `on_job` given when the bus was made.

        `on_wakeup` hears when a job is stored; `on_recheck`, about once a second, of a queue that may hold a job nobody was woken for:
        one that came again, or was stored while there was no queue. Both best effort. A queue need not exist: a pull there ends
        at once, and a job makes it before it wakes anybody.
        """

    async def set_muted(self, queue: Queue, *, muted: bool) -> None:
        """Hear nothing of this queue, or hear of it again; in effect for what is pulled afterwards."""

    def pull(self, queue: Queue, batch: int, wait_s: float, on_end: Callable[[Queue, int], None]) -> None:
        """Ask for up to `batch` jobs, which go to `on_job`; with `wait_s` 0 only for those waiting now.

        `on_end(queue, unused)` tells how many jobs it did not bring; it is not called when it brought them all.
        """

    async def stop_pulling(self) -> None:
        """End every pull. Jobs that were on their way have reached `on_job` when this returns."""

    def send_event(self, reply: str, frame: bytes) -> None:
        """Send an event. Order is kept; delivery is at most once."""

    def request(self, reply: str, frame: bytes, on_answer: Callable[[bytes | None], None]) -> int:
        """Send an event as a question. `on_answer(None)`: nobody is listening there. Returns a ticket for `unask`."""

    def cancel_request(self, ticket: int) -> None:
        """The answer is of no interest any more. Idempotent."""

    async def subscribe_control(self, worker: str, on_control: Callable[[bytes], None]) -> None:
        """Hear `GatewayBus.control` messages for this worker."""

    async def ping(self) -> None:
        """One active round trip. Raises Unavailable."""
