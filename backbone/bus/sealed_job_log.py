"""Durable jobs with seals: the gateway refuses, counts and removes what a worker cannot have been given.

`SealedJobLog` wraps another `JobLog`, in memory or on NATS, and has the same guarantees. In addition:
- An outcome, an event, a gate request, a dead letter or a work item is returned only if its seal proves its origin
  (`backbone.bus.seals`); anything else is reported to `on_refused`.
- A refused outcome is deleted, so that the true outcome can be stored.
- Data that was stored before seals existed here, by NATS's clock, is accepted without a seal. So is data about a job whose
  first event is that old, if it agrees with that event: jobs that were queued over an upgrade run and end.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from backbone.bus.bus import Queue
from backbone.bus.job_log import JobLog, StoredDeadLetter, StoredEvent, StoredOutcome, WorkItem, WorkQueue
from backbone.bus.seals import WORKER_STATUSES, Seals, SealSecret
from schemas.errors import Unavailable
from schemas.frames import decode_frame, encode_frame
from schemas.job_events import QUEUED, GateReply, GateRequest
from schemas.jobs import Envelope, JobRecord
from schemas.outcome import Outcome

FIRST_EVENTS = 32
"""Events of a fast worker may be stored before the QUEUED event of the job."""
MAX_LOOK = 4096
"""The most events that are read in search of a few with valid seals."""
DECIDE_TRIES = 10
MAX_KNOWN = 10_000
"""The most attempts whose checked tokens are remembered."""

OnRefused = Callable[[str, str], None]
"""(kind, job): `outcome`, `event`, `question`, `dead_letter`, `message` or `item` was refused."""


class SealedJobLog:
    """A job log that returns only data whose seals are valid."""

    def __init__(self, inner: JobLog, on_refused: OnRefused) -> None:
        self._inner = inner
        self._on_refused = on_refused
        self._known: set[tuple[str, str]] = set()
        self._older: dict[str, JobRecord | None] = {}
        """Jobs without seals: their records as submitted, if they are older than seals."""
        self._seals: Seals | None = None

    @property
    def _secret(self) -> SealSecret:
        secret = self._inner.seal_secret
        if secret is None:
            raise Unavailable("the gateways' secret has not been read from NATS yet; retry shortly")
        return secret

    @property
    def seals(self) -> Seals:
        """The seals under the current secret. Raises Unavailable before `start`."""
        key = self._secret.key
        if self._seals is None or self._seals.key != key:
            self._seals, self._known, self._older = Seals(key), set(), {}
        return self._seals

    @property
    def seal_secret(self) -> SealSecret | None:
        return self._inner.seal_secret

    async def start(self) -> None:
        await self._inner.start()

    async def close(self) -> None:
        await self._inner.close()

    # The queue

    async def enqueue(self, envelope: Envelope, body: bytes, *, replaces: int = 0) -> int:
        """Store the job with a ticket and seals."""
        return await self._inner.enqueue(self.seals.envelope(envelope, body), body, replaces=replaces)

    async def read_job(self, seq: int, job: str, run: int) -> bytes | None:
        return await self._inner.read_job(seq, job, run)

    async def queue_position(self, queue: Queue, seq: int) -> int | None:
        return await self._inner.queue_position(queue, seq)

    async def delete_job(self, queue: Queue, seq: int, job: str, run: int) -> None:
        await self._inner.delete_job(queue, seq, job, run)

    # Events

    async def append_event(self, job: str, frame: bytes) -> None:
        await self._inner.append_event(job, self._sealed(job, frame))

    def append_event_unconfirmed(self, job: str, frame: bytes) -> None:
        with contextlib.suppress(Unavailable):
            self._inner.append_event_unconfirmed(job, self._sealed(job, frame))

    def _sealed(self, job: str, frame: bytes) -> bytes:
        kind, run, delivery, seq, _, payload, *_ = decode_frame(frame)
        if kind != QUEUED:
            return frame
        return encode_frame(kind, run, delivery, seq, self.seals.record(job, payload), payload)

    async def first_events(self, job: str, count: int) -> list[StoredEvent]:
        look = count
        while True:
            found = await self._inner.first_events(job, look)
            believed = [event for event in found if await self._is_event(job, event)]
            if len(believed) >= count or len(found) < look or look >= MAX_LOOK:
                return believed[:count]
            look = min(4 * look, MAX_LOOK)

    async def follow_events(self, job: str, after: int = 0) -> AsyncGenerator[StoredEvent | None, None]:
        async with contextlib.aclosing(self._inner.follow_events(job, after)) as events:
            async for event in events:
                if event is None or await self._is_event(job, event):
                    yield event

    async def _is_event(self, job: str, event: StoredEvent) -> bool:
        try:
            frame = decode_frame(event.data)
            if frame.kind == QUEUED:
                believed = self.seals.is_record(job, frame.payload, frame.token) or self._is_old(event.stored_at)
            else:
                believed = self._is_attempt(job, frame.token) or await self._older_job(job) is not None
        except ValueError:
            believed = False
        if not believed:
            self._on_refused("event", job)
        return believed

    def _is_old(self, stored_at: int | None) -> bool:
        return stored_at is not None and stored_at < self._secret.made_at

    async def _older_job(self, job: str) -> JobRecord | None:
        """Return the record as it was submitted if the job is older than seals; None for any other job."""
        if job not in self._older:
            if len(self._older) >= MAX_KNOWN:
                self._older.clear()
            self._older[job] = await self._submitted_before_seals(job)
        return self._older[job]

    async def _submitted_before_seals(self, job: str) -> JobRecord | None:
        for event in await self._inner.first_events(job, FIRST_EVENTS):
            with contextlib.suppress(ValueError):
                frame = decode_frame(event.data)
                if frame.kind == QUEUED and self._is_old(event.stored_at):
                    return JobRecord.decode(frame.payload)
        return None

    async def _is_of_older_job(self, outcome: Outcome) -> bool:
        """Return whether a worker's outcome is of a job that is older than seals, and agrees with the submitted record."""
        if outcome.status not in WORKER_STATUSES:
            return False
        record = await self._older_job(outcome.job)
        if record is None:
            return False
        return record.spec() | {"run": outcome.run} == outcome.spec()

    def _is_attempt(self, job: str, token: str) -> bool:
        seals = self.seals
        if (job, token) in self._known:
            return True
        if not seals.is_attempt(job, token):
            return False
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known.add((job, token))
        return True

    # Outcomes

    async def store_outcome(self, outcome: Outcome, payload: bytes = b"") -> bool:
        sealed = self.seals.outcome(outcome)
        for _ in range(DECIDE_TRIES):
            if await self._inner.store_outcome(sealed, payload):
                return True
            if await self.read_outcome(outcome.job) is not None:
                return False
        raise Unavailable("the outcome of this job cannot be stored now; retry shortly")

    async def read_outcome(self, job: str) -> StoredOutcome | None:
        decision = await self._inner.read_outcome(job)
        if decision is None:
            return None
        if decision.outcome.job == job and await self._is_outcome(decision.outcome, decision.stored_at):
            return decision._replace(payload=self._request(decision.outcome, decision.payload, decision.stored_at))
        self._on_refused("outcome", job)
        await self._inner.delete_outcome(job, decision.seq)
        return None

    async def _is_outcome(self, outcome: Outcome, stored_at: int) -> bool:
        return self.seals.is_outcome(outcome) or self._is_old(stored_at) or await self._is_of_older_job(outcome)

    def _request(self, outcome: Outcome, payload: bytes, stored_at: int) -> bytes:
        """Return the job message with which a failed job can be retried; empty where it is not the message that was stored."""
        is_answer = outcome.error is None
        older = self._is_old(stored_at) or self._older.get(outcome.job) is not None
        if is_answer or not payload or older or self.seals.is_message(payload, outcome):
            return payload
        self._on_refused("message", outcome.job)
        return b""

    async def delete_outcome(self, job: str, seq: int) -> None:
        await self._inner.delete_outcome(job, seq)

    def watch_outcome(self, job: str) -> AbstractAsyncContextManager[Callable[[float], Awaitable[bool]]]:
        """Watch a job for its outcome; a refused outcome may end a wait too early."""
        return self._inner.watch_outcome(job)

    async def consume_outcomes(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        async with contextlib.aclosing(
            self._inner.consume_outcomes(max_unacked=max_unacked, ack_wait_s=ack_wait_s)
        ) as items:
            async for item in items:
                if await self._is_believed(item):
                    yield item
                else:
                    await self._drop_outcome(item)

    async def _is_believed(self, item: WorkItem) -> bool:
        try:
            outcome, _ = Outcome.decode(item.data)
        except ValueError:
            return False
        return outcome.job == item.id and await self._is_outcome(outcome, item.stored_at)

    async def _drop_outcome(self, item: WorkItem) -> None:
        try:
            await self.read_outcome(item.id)
            await item.ack()
        except Unavailable:
            item.nak(1.0)

    # Gate requests

    async def serve_gate_requests(self, handler: Callable[[GateRequest], Awaitable[GateReply | None]]) -> None:

        async def answered(ask: GateRequest) -> GateReply | None:
            if self._is_attempt(ask.job, ask.token) or await self._older_job(ask.job) is not None:
                return await handler(ask)
            self._on_refused("question", ask.job)
            return None

        await self._inner.serve_gate_requests(answered)

    # Dead letters

    async def list_jobs(self) -> list[str]:
        """List the jobs; their seals are checked when their data is read."""
        return await self._inner.list_jobs()

    async def list_dead_letters(self, *, before: int | None = None, limit: int = 100) -> list[StoredDeadLetter]:
        found: list[StoredDeadLetter] = []
        while len(found) < limit:
            letters = await self._inner.list_dead_letters(before=before, limit=limit - len(found))
            if not letters:
                break
            before = letters[-1].seq
            found += [checked for letter in letters if (checked := await self._letter(letter)) is not None]
        return found

    async def find_dead_letter(self, job: str) -> StoredDeadLetter | None:
        while (letter := await self._inner.find_dead_letter(job)) is not None:
            checked = await self._letter(letter)
            if checked is not None and checked.outcome.job == job:
                return checked
            await self._inner.delete_dead_letter(letter.seq)
        return None

    async def _letter(self, letter: StoredDeadLetter) -> StoredDeadLetter | None:
        if await self._is_outcome(letter.outcome, letter.stored_at):
            return letter._replace(message=self._request(letter.outcome, letter.message, letter.stored_at))
        self._on_refused("dead_letter", letter.outcome.job)
        await self._inner.delete_dead_letter(letter.seq)
        return None

    async def delete_dead_letter(self, seq: int) -> bool:
        return await self._inner.delete_dead_letter(seq)

    # Claims

    async def claim(self, name: str, value: bytes) -> bytes:
        return await self._inner.claim(name, value)

    # Content keys

    async def claim_content_key(self, job: str, value: bytes) -> bytes:
        return await self._inner.claim_content_key(job, value)

    async def read_content_key(self, job: str) -> bytes | None:
        return await self._inner.read_content_key(job)

    async def erase_content_key(self, job: str) -> None:
        await self._inner.erase_content_key(job)

    # Work queues

    def work_queue(self, name: str) -> WorkQueue:
        return SealedWorkQueue(name, self._inner.work_queue(name), self)

    def open_item(self, queue: str, item: WorkItem) -> bytes | None:
        """Return the item's data if a gateway stored it, else None."""
        data = self.seals.open_item(queue, item.data)
        if data is not None:
            return data
        if self._is_old(item.stored_at):
            return item.data
        self._on_refused("item", item.id)
        return None


class SealedWorkQueue:
    """A work queue that returns only items which gateways have stored."""

    def __init__(self, name: str, inner: WorkQueue, log: SealedJobLog) -> None:
        self._name = name
        self._inner = inner
        self._log = log

    async def put(self, item_id: str, data: bytes) -> None:
        await self._inner.put(item_id, self._log.seals.item(self._name, data))

    async def oldest(self) -> int | None:
        return await self._inner.oldest()

    async def consume(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        async with contextlib.aclosing(self._inner.consume(max_unacked=max_unacked, ack_wait_s=ack_wait_s)) as items:
            async for item in items:
                data = self._log.open_item(self._name, item)
                if data is not None:
                    item.data = data
                    yield item
                    continue
                try:
                    await item.ack()
                except Unavailable:
                    item.nak(1.0)
