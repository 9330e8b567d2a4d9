"""One attempt at a durable job: ask the gateways for the start grant, run the backend, store events and the job's outcome.

delivered ──PROCEED, or no gateway──► running ──Finish────────────────► events stored ► COMPLETED outcome ► ack
  │ STOP ─────────► ack                 │ permanent error, time limit ► FAILED outcome ► ack
  │ WAIT ─────────► nak                 │ transient error ────────────► RETURNED, nak; the third that counts:
  │ EXHAUSTED ────► dead letter,        │                               dead letter, FAILED outcome, ack
  │                 FAILED outcome, ack │ cancelled, STOP ────────────► ack
  └ SUPERSEDED ───► silence             │ SUPERSEDED, `ack_wait` lost ► silence
                                        └ drain ran out of time ──────► RETURNED, nak

The outcome is stored before the job is acknowledged: if the worker dies in between, the job is redelivered and the gateway answers
STOP. Another outcome may have been stored first (cancelled, expired): then this attempt's answer is dropped.
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
from backbone.retry import Backoff, retry
from schemas.errors import BackendFailed, ErrorInfo, NexusError, Unavailable
from schemas.frames import BlobRef, FrameKind, Progress, encode_frame
from schemas.job_events import GateReply, GateRequest, GateVerdict
from schemas.jobs import Envelope, JobStatus, is_sse
from schemas.outcome import Outcome, outcome_of
from workers.attempt import (
    MAX_FRAME_BYTES,
    MAX_REQUESTS,
    MAX_TRANSIENT_FAILURES,
    REQUEST_RETRY_S,
    UNCOUNTED_RETURN_S,
    Attempt,
    StopReason,
    WorkerContext,
    returned_payload,
)
from workers.backends.base import Backend, Chunk, Finish

GRANT_TIMEOUT_S = 10.0
"""Without a gateway's answer, an attempt starts after this time."""
STORE_RETRY_S = 0.5
RETURN_TIMEOUT_S = 2.0
"""The time to store the last events of an attempt whose job is returned."""
FIRST_HEARTBEAT_S = 1.0
"""An attempt asks once this soon whether it may go on: while a job's start is being recorded, no gateway knows the worker to which a
cancellation would go.
"""
PROGRESS_INTERVAL_S = 1.0
"""Progress between heartbeats is reported at most at this interval."""
MAX_STORED_MESSAGE_BYTES = 768 * 1024
"""The largest message of a failed job that is stored with its outcome, for a retry."""


def backoff_s(attempt: int) -> float:
    """Return the pause after a transient failure: 1 s, 4 s, … up to 30 s."""
    return min(30.0, 4.0 ** (attempt - 1))


def split_sse_frames(data: bytes) -> list[bytes]:
    """Return server-sent events one by one, each with its blank line."""
    return [frame + b"\n\n" for frame in data.split(b"\n\n") if frame]


class DurableAttempt(Attempt):
    """An attempt at a durable job. `run` never raises but for a cancellation from outside."""

    def __init__(
        self,
        bus: WorkerBus,
        log: WorkerLog,
        blobs: BlobStore,
        backend: Backend,
        context: WorkerContext,
        job: JobDelivery,
        envelope: Envelope,
        body: bytes,
    ) -> None:
        super().__init__(bus, blobs, backend, context, job, envelope, body)
        self._job_log = log
        self._token = attempt_token(envelope.ticket)
        self._events = log.event_writer(envelope.job)
        self._number = 1
        """The number of this attempt within its run."""
        self._granted = True
        """A gateway granted the start; False: none answered."""
        self._begun = False
        self._has_confirmed = False
        """The attempt has sent its first heartbeat, FIRST_HEARTBEAT_S after its start."""
        self._running = False
        """Between PROCEED and the end of the backend's work, while the time limits hold."""
        self._pending_frames: list[bytes] = []
        """Frames of a stream that must be stored before the next chunk."""
        self._progress: Progress | None = None
        self._last_report = 0.0
        self._failure: tuple[NexusError, bool] | None = None
        self._pending_return: tuple[NexusError, float] | None = None
        self._counted = True

    async def run(self) -> None:
        """Run to the end."""
        self._task = asyncio.current_task()
        try:
            try:
                if self._stop_reason is None and await self._request_grant():
                    await self._work()
            except _JobLost:
                self._stop_reason = StopReason.OWNERSHIP_LOST
            except asyncio.CancelledError:
                if self._stop_reason is None:
                    raise
            except Exception as error:
                self._handle_error(error)
            self._running = False
            if self._stop_reason is not None:
                self._end_stopped(self._stop_reason)
            await self._conclude()
        finally:
            self._events.close()

    def enforce_limits(self, now: float) -> None:
        """Stop the attempt when a time limit is exceeded while the backend works, or whenever the job is another worker's."""
        if self._running or self._stop_reason is not None or self.outcome != "running":
            super().enforce_limits(now)
        elif not self.job.owned:
            self.stop(StopReason.OWNERSHIP_LOST)
        if self._running and not self._has_confirmed and now - self.began >= FIRST_HEARTBEAT_S:
            self._has_confirmed = True
            self._report()

    def send_heartbeat(self) -> None:
        """Extend the ownership of the job, and ask whether the attempt may go on."""
        self.job.extend()
        if self._running:
            self._report()

    def _report(self) -> None:
        """Report progress to the gateways, and ask whether the attempt may go on."""
        self._last_report = monotonic()
        self._job_log.request_gate(self._gate_request(FrameKind.HEARTBEAT), self._on_reply)

    # The start grant

    async def _request_grant(self) -> bool:
        """Return whether the attempt may start. Without any gateway it starts: a durable job needs no waiting caller."""
        requests = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRANT_TIMEOUT_S):
                while requests < MAX_REQUESTS:
                    reply = await self._request_gate(self._gate_request(FrameKind.STARTED))
                    if reply is not None:
                        return self._follow_verdict(reply)
                    requests += 1
                    await asyncio.sleep(REQUEST_RETRY_S)
        self._log.warning("attempt.started_without_grant")
        self._number, self._granted = self.job.delivery, False
        self._begin()
        return True

    def _request_gate(self, request: GateRequest) -> asyncio.Future[GateReply | None]:
        replied: asyncio.Future[GateReply | None] = self._loop.create_future()

        def on_reply(reply: GateReply | None) -> None:
            if not replied.done():
                replied.set_result(reply)

        self._job_log.request_gate(request, on_reply)
        return replied

    def _follow_verdict(self, reply: GateReply) -> bool:
        if reply.kind is GateVerdict.PROCEED:
            self._number = reply.attempt
            self._begin()
            return True
        if reply.kind is GateVerdict.WAIT:
            self.job.nak(reply.delay_s)
            self.outcome = "returned"
        elif reply.kind is GateVerdict.EXHAUSTED:
            self._number = reply.attempt
            info = ErrorInfo.model_validate(reply.error) if reply.error else None
            self._fail(NexusError.from_info(info) if info else BackendFailed(code="worker_lost"), dead=True)
        else:
            superseded = reply.kind is GateVerdict.SUPERSEDED
            self._stop_reason = StopReason.SUPERSEDED if superseded else StopReason.DISCONNECTED
        return False

    def _begin(self) -> None:
        self.began = self.last_output = self._phase_began = monotonic()
        self._begun = self._running = True
        self._send(FrameKind.STARTED, 0, self._context.started)

    def _gate_request(self, kind: FrameKind) -> GateRequest:
        env = self.envelope
        progress = self._progress.model_copy(update={"preview": None}) if self._progress is not None else None
        return GateRequest(
            kind=kind,
            job=env.job,
            run=env.run,
            delivery=self.job.delivery,
            token=self._token,
            owner=env.owner,
            key=env.key,
            worker=self._context.worker,
            backend=self._context.backend,
            progress=progress,
            counted=self._counted,
        )

    def _on_reply(self, reply: GateReply | None) -> None:
        if reply is not None and reply.kind in {GateVerdict.STOP, GateVerdict.SUPERSEDED}:
            self.stop(StopReason.DISCONNECTED if reply.kind is GateVerdict.STOP else StopReason.SUPERSEDED)

    # Output

    def _send(self, kind: FrameKind, seq: int, payload: bytes = b"") -> None:
        if not self.job.owned:
            self.stop(StopReason.OWNERSHIP_LOST)
            return
        env = self.envelope
        self._events.append(encode_frame(kind.value, env.run, self.job.delivery, seq, self._token, payload))

    def _take_chunk(self, chunk: Chunk) -> bool:
        """Buffer output for the result, and store it as an event where the caller streams. True: `_flush_output` must follow."""
        self._tokens += chunk.tokens
        self._loading = False
        self.last_output = monotonic()
        data = chunk.data
        if not data:
            return False
        self._buffered.append(data)
        self._buffered_size += len(data)
        if self.envelope.stream:
            self._store_chunk(data)
        return (
            bool(self._pending_frames or self._writer or self._events.is_full)
            or self._buffered_size > INLINE_LIMIT_BYTES
        )

    def _store_chunk(self, data: bytes) -> None:
        if is_sse(self.envelope.stream_type):
            frames = split_sse_frames(data)
        else:
            frames = [data[start : start + MAX_FRAME_BYTES] for start in range(0, len(data), MAX_FRAME_BYTES)]
        if any(len(frame) > INLINE_LIMIT_BYTES for frame in frames):
            self._pending_frames = frames
            return
        for frame in frames:
            self._send_next(FrameKind.CHUNK, frame)

    async def _flush_output(self) -> None:
        pending, self._pending_frames = self._pending_frames, []
        for frame in pending:
            if len(frame) <= INLINE_LIMIT_BYTES:
                self._send_next(FrameKind.CHUNK, frame)
                continue
            writer = self._blobs.writer(ttl_s=self.envelope.keep_s, owner=self.envelope.owner)
            try:
                await writer.write(frame)
                info = await writer.close()
            except BaseException:
                await writer.abort()
                raise
            self._send_next(FrameKind.BLOB, BlobRef(name=info.name, size=info.size).model_dump_json().encode())
        if self._buffered_size > INLINE_LIMIT_BYTES or self._writer is not None:
            await self._write_to_blob()
        if self._events.is_full:
            await self._events.flush()
        self.last_output = monotonic()

    async def _write_to_blob(self) -> None:
        env = self.envelope
        if self._writer is None:
            content_type = env.stream_type if env.stream else "application/json"
            self._writer = self._blobs.writer(ttl_s=env.keep_s, content_type=content_type, owner=env.owner)
        buffered, self._buffered = self._buffered, []
        for data in buffered:
            await self._writer.write(data)

    def _take_progress(self, progress: Progress) -> None:
        super()._take_progress(progress)
        self._progress = progress
        if monotonic() - self._last_report >= PROGRESS_INTERVAL_S:
            self._report()

    async def _complete(self, finish: Finish) -> None:
        self._running = False
        env = self.envelope
        size, ref, payload = self._buffered_size, None, b""
        if self._writer is not None:
            await self._write_to_blob()
            ref = await self._close_writer()
        else:
            payload = b"".join(self._buffered)
        await self._events.flush()
        outcome = self._make_outcome(
            JobStatus.COMPLETED,
            content_type=env.stream_type if env.stream else finish.content_type,
            usage=finish.usage,
            adapted=self.adapted,
            size=size,
            blob=ref,
        )
        first = await self._store_outcome(outcome, payload)
        if not first and ref is not None:
            self._blobs.remove(ref.name)
        self.job.ack()
        self.outcome = "completed" if first else "cancelled"
        self.last_output = monotonic()

    # The end

    def _handle_error(self, error: Exception) -> None:
        wrapped, transient = self._wrap_error(error)
        if transient and not self._counts_as_failure(wrapped):
            self._return_job(wrapped, UNCOUNTED_RETURN_S, counted=False)
        elif transient and self._number < MAX_TRANSIENT_FAILURES:
            self._return_job(wrapped, backoff_s(self._number))
        else:
            self._fail(wrapped, dead=transient)

    def _end(self, error: NexusError) -> None:
        self._fail(error, dead=False)

    def _fail(self, error: NexusError, *, dead: bool) -> None:
        self.error = error.info
        self._failure = (error, dead)

    def _return_job(self, error: NexusError, delay_s: float, *, counted: bool = True) -> None:
        self.error = error.info
        self._counted = counted
        self._pending_return = (error, delay_s)

    async def _conclude(self) -> None:
        """Store the end of the attempt, and settle the job. The job's ownership bounds this."""
        try:
            if self._failure is not None:
                await self._conclude_failed(*self._failure)
            elif self._pending_return is not None:
                await self._conclude_returned(*self._pending_return)
        except _JobLost:
            self.outcome = "fenced"
        except asyncio.CancelledError:
            # `stop` was called meanwhile: the job has its outcome, or is another worker's.
            if self._stop_reason is None:
                raise
            if self._stop_reason in {StopReason.DISCONNECTED, StopReason.CANCELLED}:
                self.job.ack()
            self.outcome = "fenced"

    async def _conclude_failed(self, error: NexusError, dead: bool) -> None:
        message = self.job.message if len(self.job.message) <= MAX_STORED_MESSAGE_BYTES else b""
        outcome = self._make_outcome(JobStatus.FAILED, error=error.info, dead=dead)
        if dead:
            await self._retry_until_stored(lambda: self._job_log.store_dead_letter(outcome, message))
        await self._store_outcome(outcome, message)
        self.job.ack()
        self.outcome = "failed"

    async def _conclude_returned(self, error: NexusError, delay_s: float) -> None:
        if self._begun:
            self._send_next(FrameKind.RETURNED, returned_payload(error, counted=self._counted))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETURN_TIMEOUT_S):
                    await self._events.flush()
        self._job_log.request_gate(self._gate_request(FrameKind.RETURNED), lambda _: None)
        self.job.nak(delay_s)
        self.outcome = "returned"

    def _make_outcome(self, status: JobStatus, **fields: Any) -> Outcome:
        return outcome_of(
            self.envelope,
            status,
            token=self._token,
            delivery=self.job.delivery,
            events=self._seq + 1 if self._begun else 0,
            worker=self._context.worker,
            attempts=self._number,
            granted=self._granted,
            seconds=round(monotonic() - self.began, 4),
            **fields,
        )

    async def _store_outcome(self, outcome: Outcome, payload: bytes) -> bool:
        """Store the outcome. Return False where another outcome was first, and a gateway confirms that it counts."""
        while not await self._retry_until_stored(lambda: self._job_log.store_outcome(outcome, payload)):
            reply = await self._request_gate(self._gate_request(FrameKind.HEARTBEAT))
            if reply is not None and reply.kind is GateVerdict.STOP:
                return False
            if (reply is not None and reply.kind is GateVerdict.SUPERSEDED) or not self.job.owned:
                raise _JobLost
            await asyncio.sleep(STORE_RETRY_S)
        return True

    async def _retry_until_stored(self, call: Any) -> Any:
        """Repeat a call that NATS does not confirm, as long as the job belongs to this worker. Raises _JobLost."""

        def on_error(error: Exception) -> None:
            self._log.warning("attempt.outcome_not_stored", error=str(error))
            if not self.job.owned:
                raise _JobLost

        return await retry(call, on=Unavailable, backoff=Backoff(STORE_RETRY_S), on_error=on_error)


class _JobLost(Exception):
    """The job belongs to another worker by now."""
