"""One attempt at a durable job: ask the gateways for leave, run the backend, store events, end the job by its terminal word.

taken ──GO, or no gateway there──► running ──Finish────────────────► events stored ► COMPLETED word ► ack
  │ GONE ─────────► ack               │ permanent error, time limit ► FAILED word ► ack
  │ WAIT ─────────► give back         │ transient error ────────────► RETURNED, give back; the third that counts
  │ DEAD ─────────► dead letter,      │                               dead letter, FAILED word, ack
  │                 FAILED word, ack  │ cancelled, GONE ────────────► ack
  └ STALE ────────► silence           │ STALE, `ack_wait` lost ─────► silence
                                      └ drain ran out of time ──────► RETURNED, give back

The word is stored before the job is acknowledged: whoever dies in between, the job comes again and the gateway says GONE.
Another word may have been first (cancelled, expired): then this attempt's answer is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic
from typing import Any

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobStore
from backbone.bus.bus import JobDelivery, WorkerBus
from backbone.bus.job_log import WorkerLog
from backbone.bus.seals import attempt_token
from schemas.errors import BackendFailed, ErrorInfo, NexusError, Unavailable
from schemas.frames import BlobRef, FrameKind, Progress
from schemas.job_events import GateReply, GateRequest, GateVerdict, encode_durable_frame
from schemas.jobs import Envelope, JobStatus, is_sse
from schemas.outcome import Outcome, outcome_of
from workers.backends.base import Backend, Chunk, Finish
from workers.sync_attempt import (
    ASK_AGAIN_S,
    ASK_TRIES,
    MAX_FRAME,
    MAX_TRANSIENT,
    UNCOUNTED_S,
    Attempt,
    StopReason,
    WorkerContext,
    returned,
)

LEAVE_S = 10.0
"""For the gateways to give leave; without their word, an attempt begins after this."""
DECIDE_AGAIN_S = 0.5
RETURN_S = 2.0
"""For the last events of an attempt that is given back to be stored."""
FIRST_BEAT_S = 1.0
"""An attempt asks once this soon whether its job still stands: a job that is cancelled while its start is being recorded has no
worker yet that a gateway could tell.
"""
TELL_EVERY_S = 1.0
"""Progress between heartbeats is told at most this often."""
MAX_KEPT = 768 * 1024
"""Bytes of a failed job's message that are kept with its word, to be tried again."""


def backoff_s(attempt: int) -> float:
    """The pause after a transient failure: 1 s, 4 s, …"""
    return min(30.0, 4.0 ** (attempt - 1))


def sse_frames(data: bytes) -> list[bytes]:
    """Server-sent events, one by one, each with its blank line."""
    return [frame + b"\n\n" for frame in data.split(b"\n\n") if frame]


class DurableAttempt(Attempt):
    """See the module's docstring. `run` never raises but for cancellation from outside."""

    def __init__(
        self,
        bus: WorkerBus,
        log: WorkerLog,
        blobs: BlobStore,
        backend: Backend,
        who: WorkerContext,
        job: JobDelivery,
        envelope: Envelope,
        body: bytes,
    ) -> None:
        super().__init__(bus, blobs, backend, who, job, envelope, body)
        self._store = log
        self._token = attempt_token(envelope.ticket)
        self._events = log.event_writer(envelope.job)
        self._number = 1
        """Which attempt of its run this is."""
        self._granted = True
        """A gateway let it begin; False: none answered."""
        self._begun = False
        self._confirmed = False
        """It has asked, FIRST_BEAT_S after it began, whether the job still stands."""
        self._running = False
        """Between GO and the end of the backend's work: the time limits hold."""
        self._pending: list[bytes] = []
        """Frames of a stream that must be stored before the next piece."""
        self._newest: Progress | None = None
        self._told_at = 0.0
        self._failure: tuple[NexusError, bool] | None = None
        self._give_back: tuple[NexusError, float] | None = None
        self._counted = True

    async def run(self) -> None:
        """Run to the end."""
        self._task = asyncio.current_task()
        try:
            try:
                if self._stop is None and await self._may_begin():
                    await self._work()
            except _JobLost:
                self._stop = StopReason.LOST
            except asyncio.CancelledError:
                if self._stop is None:
                    raise
            except Exception as error:
                self._failed(error)
            self._running = False
            if self._stop is not None:
                self._stopped(self._stop)
            await self._conclude()
        finally:
            self._events.close()

    def watch(self, now: float) -> None:
        """Time limits hold while the backend works; the ownership of the job, always."""
        if self._running or self._stop is not None or self.outcome != "running":
            super().watch(now)
        elif not self.job.owned:
            self.stop(StopReason.LOST)
        if self._running and not self._confirmed and now - self.began >= FIRST_BEAT_S:
            self._confirmed = True
            self._still_stands()

    def beat(self) -> None:
        """Keep the job, and ask whether it still stands."""
        self.job.extend()
        if self._running:
            self._still_stands()

    def _still_stands(self) -> None:
        self._told_at = monotonic()
        self._store.request_gate(self._question(FrameKind.HEARTBEAT), self._heard_back)

    # Leave to begin

    async def _may_begin(self) -> bool:
        """Whether the gateways let it. Without any of them there, the job goes on: it is not its caller's."""
        tries = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                while tries < ASK_TRIES:
                    answer = await self._put(self._question(FrameKind.STARTED))
                    if answer is not None:
                        return self._obey(answer)
                    tries += 1
                    await asyncio.sleep(ASK_AGAIN_S)
        self._log.warning("attempt.started_without_grant")
        self._number, self._granted = self.job.delivery, False
        self._begin()
        return True

    def _put(self, ask: GateRequest) -> asyncio.Future[GateReply | None]:
        answered: asyncio.Future[GateReply | None] = self._loop.create_future()

        def hear(answer: GateReply | None) -> None:
            if not answered.done():
                answered.set_result(answer)

        self._store.request_gate(ask, hear)
        return answered

    def _obey(self, answer: GateReply) -> bool:
        if answer.kind is GateVerdict.PROCEED:
            self._number = answer.attempt
            self._begin()
            return True
        if answer.kind is GateVerdict.WAIT:
            self.job.nak(answer.delay_s)
            self.outcome = "returned"
        elif answer.kind is GateVerdict.EXHAUSTED:
            self._number = answer.attempt
            info = ErrorInfo.model_validate(answer.error) if answer.error else None
            self._fail(NexusError.from_info(info) if info else BackendFailed(code="worker_lost"), dead=True)
        else:
            self._stop = StopReason.STALE if answer.kind is GateVerdict.SUPERSEDED else StopReason.GONE
        return False

    def _begin(self) -> None:
        self.began = self.last_output = self._phase_began = monotonic()
        self._begun = self._running = True
        self._send(FrameKind.STARTED, 0, self._who.started)

    def _question(self, kind: FrameKind) -> GateRequest:
        env = self.envelope
        progress = self._newest.model_copy(update={"preview": None}) if self._newest is not None else None
        return GateRequest(
            kind=kind,
            job=env.job,
            run=env.run,
            delivery=self.job.delivery,
            token=self._token,
            owner=env.owner,
            key=env.key,
            worker=self._who.worker,
            backend=self._who.backend,
            progress=progress,
            counted=self._counted,
        )

    def _heard_back(self, answer: GateReply | None) -> None:
        if answer is not None and answer.kind in {GateVerdict.STOP, GateVerdict.SUPERSEDED}:
            self.stop(StopReason.GONE if answer.kind is GateVerdict.STOP else StopReason.STALE)

    # Output

    def _send(self, kind: FrameKind, seq: int, payload: bytes = b"") -> None:
        if not self.job.owned:
            self.stop(StopReason.LOST)
            return
        env = self.envelope
        self._events.append(encode_durable_frame(kind.value, env.run, self.job.delivery, seq, self._token, payload))

    def _chunk(self, piece: Chunk) -> bool:
        """Store it as an event, where the caller streams, and hold it for the result. True: `_spill` must follow."""
        self._tokens += piece.tokens
        self._loading = False
        self.last_output = monotonic()
        data = piece.data
        if not data:
            return False
        self._held.append(data)
        self._held_size += len(data)
        if self.envelope.stream:
            self._tell(data)
        return bool(self._pending or self._writer or self._events.is_full) or self._held_size > INLINE_LIMIT_BYTES

    def _tell(self, data: bytes) -> None:
        if is_sse(self.envelope.stream_type):
            frames = sse_frames(data)
        else:
            frames = [data[start : start + MAX_FRAME] for start in range(0, len(data), MAX_FRAME)]
        if any(len(frame) > INLINE_LIMIT_BYTES for frame in frames):
            self._pending = frames
            return
        for frame in frames:
            self._next(FrameKind.CHUNK, frame)

    async def _spill(self) -> None:
        pending, self._pending = self._pending, []
        for frame in pending:
            if len(frame) <= INLINE_LIMIT_BYTES:
                self._next(FrameKind.CHUNK, frame)
                continue
            writer = self._blobs.writer(ttl_s=self.envelope.keep_s, owner=self.envelope.owner)
            try:
                await writer.write(frame)
                info = await writer.close()
            except BaseException:
                await writer.abort()
                raise
            self._next(FrameKind.BLOB, BlobRef(name=info.name, size=info.size).model_dump_json().encode())
        if self._held_size > INLINE_LIMIT_BYTES or self._writer is not None:
            await self._hold_in_blob()
        if self._events.is_full:
            await self._events.flush()
        self.last_output = monotonic()

    async def _hold_in_blob(self) -> None:
        env = self.envelope
        if self._writer is None:
            content_type = env.stream_type if env.stream else "application/json"
            self._writer = self._blobs.writer(ttl_s=env.keep_s, content_type=content_type, owner=env.owner)
        held, self._held = self._held, []
        for data in held:
            await self._writer.write(data)

    def _progress(self, progress: Progress) -> None:
        super()._progress(progress)
        self._newest = progress
        if monotonic() - self._told_at >= TELL_EVERY_S:
            self._still_stands()

    async def _finished(self, finish: Finish) -> None:
        self._running = False
        env = self.envelope
        size, ref, payload = self._held_size, None, b""
        if self._writer is not None:
            await self._hold_in_blob()
            ref = await self._close_writer()
        else:
            payload = b"".join(self._held)
        await self._events.flush()
        word = self._word(
            JobStatus.COMPLETED,
            content_type=env.stream_type if env.stream else finish.content_type,
            usage=finish.usage,
            adapted=self.adapted,
            size=size,
            blob=ref,
        )
        first = await self._decide(word, payload)
        if not first and ref is not None:
            self._blobs.remove(ref.name)
        self.job.ack()
        self.outcome = "completed" if first else "cancelled"
        self.last_output = monotonic()

    # The end

    def _failed(self, error: Exception) -> None:
        wrapped, transient = self._wrapped(error)
        if transient and not self._counts(wrapped):
            self._return(wrapped, UNCOUNTED_S, counted=False)
        elif transient and self._number < MAX_TRANSIENT:
            self._return(wrapped, backoff_s(self._number))
        else:
            self._fail(wrapped, dead=transient)

    def _end(self, error: NexusError) -> None:
        self._fail(error, dead=False)

    def _fail(self, error: NexusError, *, dead: bool) -> None:
        self.error = error.info
        self._failure = (error, dead)

    def _return(self, error: NexusError, delay_s: float, *, counted: bool = True) -> None:
        self.error = error.info
        self._counted = counted
        self._give_back = (error, delay_s)

    async def _conclude(self) -> None:
        """What is said last, and then done with the job. Bounded by the job's ownership."""
        try:
            if self._failure is not None:
                await self._conclude_failed(*self._failure)
            elif self._give_back is not None:
                await self._conclude_returned(*self._give_back)
        except _JobLost:
            self.outcome = "fenced"
        except asyncio.CancelledError:
            # Stopped meanwhile, by `stop`: the job is decided, or another worker's.
            if self._stop is None:
                raise
            if self._stop in {StopReason.GONE, StopReason.CANCELLED}:
                self.job.ack()
            self.outcome = "fenced"

    async def _conclude_failed(self, error: NexusError, dead: bool) -> None:
        message = self.job.message if len(self.job.message) <= MAX_KEPT else b""
        word = self._word(JobStatus.FAILED, error=error.info, dead=dead)
        if dead:
            await self._until_stored(lambda: self._store.store_dead_letter(word, message))
        await self._decide(word, message)
        self.job.ack()
        self.outcome = "failed"

    async def _conclude_returned(self, error: NexusError, delay_s: float) -> None:
        if self._begun:
            self._next(FrameKind.RETURNED, returned(error, counted=self._counted))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETURN_S):
                    await self._events.flush()
        self._store.request_gate(self._question(FrameKind.RETURNED), lambda _: None)
        self.job.nak(delay_s)
        self.outcome = "returned"

    def _word(self, status: JobStatus, **fields: Any) -> Outcome:
        return outcome_of(
            self.envelope,
            status,
            token=self._token,
            delivery=self.job.delivery,
            events=self._seq + 1 if self._begun else 0,
            worker=self._who.worker,
            attempts=self._number,
            granted=self._granted,
            seconds=round(monotonic() - self.began, 4),
            **fields,
        )

    async def _decide(self, word: Outcome, payload: bytes) -> bool:
        """Store the outcome. False: another one was first, and a gateway vouches for it: it may have been refused and removed."""
        while not await self._until_stored(lambda: self._store.store_outcome(word, payload)):
            answer = await self._put(self._question(FrameKind.HEARTBEAT))
            if answer is not None and answer.kind is GateVerdict.STOP:
                return False
            if (answer is not None and answer.kind is GateVerdict.SUPERSEDED) or not self.job.owned:
                raise _JobLost
            await asyncio.sleep(DECIDE_AGAIN_S)
        return True

    async def _until_stored(self, call: Any) -> Any:
        """Repeat what NATS does not confirm, as long as the job is ours."""
        while True:
            try:
                return await call()
            except Unavailable as error:
                self._log.warning("attempt.outcome_not_stored", error=error.info.message)
            if not self.job.owned:
                raise _JobLost
            await asyncio.sleep(DECIDE_AGAIN_S)


class _JobLost(Exception):
    """The job is another worker's by now."""
