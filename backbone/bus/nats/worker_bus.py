"""The worker's side of the bus on NATS JetStream.

It pulls on an inbox of its own: nats-py's `fetch` leaves an open pull behind when it is cancelled, and the next job is lost
there until `ack_wait`. Here every job that arrives reaches `on_job`, and jobs are counted per queue: NATS tells the subject of
a job, but not the pull that brought it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from backbone.bus.bus import MAX_FRESH_AGE_S, JobDelivery, Queue
from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.headers import parse_ack_subject, parse_status
from backbone.bus.nats.store_clock import StoreClock
from backbone.bus.nats.wakeups import WakeupSubscriptions
from backbone.bus.subjects import JOBS_STREAM, WORKER_CONTROL, consumer_name, job_subject
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

NANO = 1_000_000_000
DRAIN_POLL_INTERVAL_S = 0.1
LOST_PULL_GRACE_S = 3.0
"""A pull without any reply for this time after its expiry was lost with its server."""


class NatsDelivery:
    """A job on its way from NATS; see backbone.bus.bus.JobDelivery."""

    __slots__ = ("_ack_subject", "_bus", "_until", "age_s", "delivery", "fresh", "message", "pending", "queue")

    def __init__(self, bus: NatsWorkerBus, queue: Queue, message: bytes, ack_subject: bytes) -> None:
        self._bus = bus
        self._ack_subject = ack_subject
        self.queue = queue
        self.message = message
        self.delivery, _, stored_ns, self.pending = parse_ack_subject(ack_subject)
        now = bus.now()
        self.age_s = bus.store_clock.age_s(stored_ns, now)
        self.fresh = self.age_s <= MAX_FRESH_AGE_S and self.delivery == 1
        self._until = now + bus.ack_wait_s

    @property
    def owned(self) -> bool:
        """Whether `ack_wait` has not passed, by this process's monotonic clock, which goes on while the process is frozen."""
        return self._bus.now() < self._until

    def _settle(self, ack: bytes) -> None:
        # After `ack_wait` the message belongs to another worker, and this would hit its run.
        if self.owned:
            self._bus.settle(self._ack_subject, ack)
        self._until = 0.0

    def ack(self) -> None:
        """Acknowledge without waiting: if the acknowledgement is lost, the job is delivered again and the gateway answers STOP."""
        self._settle(b"+ACK")

    def nak(self, delay_s: float = 0.0) -> None:
        self._settle(b'-NAK {"delay":%d}' % int(delay_s * NANO) if delay_s else b"-NAK")

    def extend(self) -> None:
        if self.owned:
            self._until = self._bus.now() + self._bus.ack_wait_s
            self._bus.settle(self._ack_subject, b"+WPI")


class _PullState:
    """The open pulls of one queue."""

    __slots__ = ("api", "batch", "expires_at", "index", "on_end", "outstanding", "queue")

    def __init__(self, queue: Queue, index: int) -> None:
        self.queue = queue
        self.index = index
        self.api = f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.{consumer_name(*queue)}".encode()
        self.outstanding = 0
        self.expires_at = 0.0
        self.on_end: Callable[[Queue, int], None] | None = None

    def end(self, unused: int) -> None:
        """End `unused` of the outstanding jobs: they will not come."""
        unused = min(unused, self.outstanding)
        self.outstanding -= unused
        if self.on_end is not None:
            self.on_end(self.queue, unused)


class NatsWorkerBus:
    """The worker's side of the bus; see backbone.bus.bus.WorkerBus."""

    def __init__(
        self, server: NatsAccess | str, *, worker: str, ack_wait_s: float, on_job: Callable[[JobDelivery], None]
    ) -> None:
        self._connection = NatsConnection(server, worker, on_reconnect=self._reconnected)
        self.ack_wait_s = ack_wait_s
        self.store_clock = StoreClock()
        self._on_job = on_job
        self._pulls: dict[Queue, _PullState] = {}
        self._by_subject: dict[bytes, _PullState] = {}
        self._by_index: dict[int, _PullState] = {}
        self._next_index = 0
        self._pull_inbox = ""
        self._pull_inbox_sid: int | None = None
        self._draining_inbox_sid: int | None = None
        """The inbox of pulls that may still bring jobs after the worker has stopped pulling; such jobs are returned at once."""
        self._wakeups = WakeupSubscriptions(self._connection)
        self._pending_requests: dict[int, Callable[[bytes | None], None]] = {}
        self._next_ticket = 0
        self._reply_inbox = ""
        self._sweep_task: asyncio.Task[None] | None = None

    def now(self) -> float:
        """Return monotonic seconds. The loop's clock stands still during a turn, and a frozen process thaws within one."""
        return time.monotonic()

    async def start(self) -> None:
        """Connect, and open the inboxes."""
        await self._connection.connect()
        self._reply_inbox = self._connection.new_inbox()
        await self._connection.subscribe(f"{self._reply_inbox}.*", self._on_reply)
        await self._open_inbox()
        self._sweep_task = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Wait for pulls that cannot be ended, then flush and disconnect."""
        await self._outlast_pulls()
        if self._sweep_task is not None:
            self._sweep_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweep_task
        await self._connection.close()

    @property
    def connected(self) -> bool:
        return self._connection.connected

    async def ping(self) -> None:
        await self._connection.ping()

    async def _open_inbox(self) -> None:
        self._pull_inbox = self._connection.new_inbox()
        self._pull_inbox_sid = await self._connection.subscribe(f"{self._pull_inbox}.*", self._on_pulled)

    async def _reconnected(self) -> None:
        """End the pulls of the lost connection. A new inbox keeps out what a cluster still holds for the old one."""
        if self._pull_inbox_sid is not None:
            await self._connection.unsubscribe(self._pull_inbox_sid)
            await self._open_inbox()
        for pull in self._pulls.values():
            if pull.outstanding:
                pull.end(pull.outstanding)

    # Pulls

    async def serve(
        self,
        queues: list[Queue],
        on_wakeup: Callable[[Queue], None] | None,
        on_recheck: Callable[[Queue], None] | None = None,
    ) -> None:
        """Replace the queues and their wake-up subscriptions, and open the inbox again after `stop_pulling`."""
        if self._draining_inbox_sid is not None:
            self._connection.drop_subscription(self._draining_inbox_sid)
            self._draining_inbox_sid = None
        if self._pull_inbox_sid is None:
            await self._open_inbox()
        wanted = set(queues)
        for queue in [q for q in self._pulls if q not in wanted]:
            pull = self._pulls.pop(queue)
            self._by_index.pop(pull.index, None)
            self._by_subject.pop(job_subject(*queue).encode(), None)
            if pull.outstanding:
                pull.end(pull.outstanding)
        for queue in queues:
            if queue not in self._pulls:
                self._next_index += 1
                pull = _PullState(queue, self._next_index)
                self._pulls[queue] = pull
                self._by_index[pull.index] = pull
                self._by_subject[job_subject(*queue).encode()] = pull
        await self._wakeups.serve(queues, on_wakeup, on_recheck)

    async def set_muted(self, queue: Queue, *, muted: bool) -> None:
        await self._wakeups.set_muted(queue, muted=muted)

    def pull(self, queue: Queue, batch: int, wait_s: float, on_end: Callable[[Queue, int], None]) -> None:
        """Publish the pull request."""
        pull = self._pulls[queue]
        pull.on_end = on_end
        request = (
            b'{"batch":%d,"expires":%d}' % (batch, int(wait_s * NANO))
            if wait_s
            else b'{"batch":%d,"no_wait":true}' % batch
        )
        pull.outstanding += batch
        pull.expires_at = self.now() + wait_s + LOST_PULL_GRACE_S
        try:
            self._connection.publish(pull.api, request, f"{self._pull_inbox}.{pull.index}".encode())
        except Unavailable:
            pull.end(batch)

    def _on_pulled(self, subject: bytes, ack_subject: bytes, headers: bytes, data: bytes) -> None:
        if ack_subject.startswith(b"$JS.ACK."):
            pull = self._by_subject.get(subject)
            if pull is not None and pull.outstanding > 0:
                pull.outstanding -= 1
            if pull is None or self._draining_inbox_sid is not None:
                self.settle(ack_subject, b"-NAK")
                return
            self._on_job(NatsDelivery(self, pull.queue, data, ack_subject))
            return
        pull = self._by_index.get(int(subject[len(self._pull_inbox) + 1 :]))
        status = parse_status(headers)
        if pull is None or status is None or status.code == 100:
            return
        unused = pull.outstanding if status.unused is None else status.unused
        pull.end(unused)

    async def stop_pulling(self) -> None:
        """Drop the inbox: the server ends pulls without interest, and delivers first what it had sent before.

        In a cluster, the server that leads a consumer may not see that an inbox of another account is gone (ADR 0029). There
        the inbox stays, and arriving jobs are returned, until the pulls have ended or the bus is closed.
        """
        if self._pull_inbox_sid is None:
            return
        sid, self._pull_inbox_sid = self._pull_inbox_sid, None
        for pull in self._pulls.values():
            pull.on_end = None
        if self._connection.clustered and any(pull.outstanding for pull in self._pulls.values()):
            with contextlib.suppress(Unavailable):
                await self._connection.ping()
            self._draining_inbox_sid = sid
            return
        await self._connection.unsubscribe(sid)
        for pull in self._pulls.values():
            pull.outstanding = 0

    async def _outlast_pulls(self) -> None:
        if self._draining_inbox_sid is None:
            return
        open_pulls = [pull for pull in self._pulls.values() if pull.outstanding]
        until = max((pull.expires_at for pull in open_pulls), default=0.0)
        while self._connection.connected and self.now() < until and any(pull.outstanding for pull in open_pulls):
            await asyncio.sleep(DRAIN_POLL_INTERVAL_S)
        sid, self._draining_inbox_sid = self._draining_inbox_sid, None
        await self._connection.unsubscribe(sid)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            now = self.now()
            for pull in list(self._pulls.values()):
                if pull.outstanding and now > pull.expires_at:
                    pull.end(pull.outstanding)

    def settle(self, ack_subject: bytes, ack: bytes) -> None:
        """Send an acknowledgement; best effort."""
        with contextlib.suppress(Unavailable):
            self._connection.publish(ack_subject, ack)

    # Events

    def send_event(self, reply: str, frame: bytes, *, may_wait: bool = False) -> None:
        self._connection.publish(reply.encode(), frame, may_wait=may_wait)

    def request(self, reply: str, frame: bytes, on_answer: Callable[[bytes | None], None]) -> int:
        """Publish an event with a reply subject of this process."""
        self._next_ticket += 1
        ticket = self._next_ticket
        self._pending_requests[ticket] = on_answer
        self._connection.publish(reply.encode(), frame, f"{self._reply_inbox}.{ticket}".encode())
        return ticket

    def cancel_request(self, ticket: int) -> None:
        self._pending_requests.pop(ticket, None)

    def _on_reply(self, subject: bytes, _reply: bytes, headers: bytes, data: bytes) -> None:
        on_answer = self._pending_requests.pop(int(subject[len(self._reply_inbox) + 1 :]), None)
        if on_answer is not None:
            # No responders: an empty message with status 503.
            on_answer(None if headers and not data else data)

    async def subscribe_control(self, worker: str, on_control: Callable[[bytes], None]) -> None:

        def on_message(_subject: bytes, _reply: bytes, _headers: bytes, data: bytes) -> None:
            on_control(data)

        await self._connection.subscribe(f"{WORKER_CONTROL}.{worker}", on_message)
