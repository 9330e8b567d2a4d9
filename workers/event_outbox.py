"""Output of an attempt at a durable job: stored events, blobs, and the job's outcome.

The outcome is stored before the job is acknowledged: if the worker dies in between, the job is redelivered and the gateway answers
STOP. Another outcome may have been stored first (cancelled, expired): then this attempt's answer is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from typing import Any, TypeVar

import structlog

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobStore
from backbone.bus.bus import JobDelivery
from backbone.bus.content_seals import seal_frame, seal_result
from backbone.bus.job_log import WorkerLog
from backbone.bus.seals import attempt_token
from backbone.retry import Backoff, retry
from schemas.errors import NexusError, Unavailable
from schemas.frames import BlobRef, Frame, FrameKind, encode_frame
from schemas.job_events import GateReply, GateRequest, GateVerdict
from schemas.jobs import Envelope, JobStatus, is_sse
from schemas.outcome import Outcome, outcome_of
from workers.backends.base import BackendError, Finish
from workers.outbox import MAX_FRAME_BYTES, MAX_TRANSIENT_FAILURES, JobLost, OnReply, Outbox, returned_payload
from workers.worker_context import WorkerContext

log = structlog.get_logger(__name__)
Result = TypeVar("Result")

STORE_RETRY_S = 0.5
OPEN_KINDS = frozenset({FrameKind.STARTED, FrameKind.RETURNED})
"""Events of a sealed job that hold no content, and that gateways count."""
HIDDEN_MESSAGE = (
    "The inference server failed or refused the request. Its message is not stored, since it may repeat the request."
)
RETURN_TIMEOUT_S = 2.0
"""The time to store the last events of an attempt whose job is returned."""
MAX_STORED_MESSAGE_BYTES = 768 * 1024
"""The largest message of a failed job that is stored with its outcome, for a retry."""


def backoff_s(attempt: int) -> float:
    """Return the pause after a transient failure: 1 s, 4 s, … up to 30 s."""
    return min(30.0, 4.0 ** (attempt - 1))


def split_sse_frames(data: bytes) -> list[bytes]:
    """Return server-sent events one by one, each with its blank line."""
    return [frame + b"\n\n" for frame in data.split(b"\n\n") if frame]


class EventOutbox(Outbox):
    """The events and the outcome of one attempt at a durable job."""

    needs_gateway = False
    grant_timeout_s = 10.0
    resend_s = grant_timeout_s
    report_interval_s = 1.0

    def __init__(
        self, job_log: WorkerLog, blobs: BlobStore, context: WorkerContext, job: JobDelivery, envelope: Envelope
    ) -> None:
        super().__init__(blobs, job, envelope, attempt_token(envelope.ticket))
        self._job_log = job_log
        self._context = context
        self._events = job_log.event_writer(envelope.job)
        self._granted = True
        """A gateway granted the start; False: none answered."""
        self._began: float | None = None
        self._first_output: float | None = None
        self._pending_frames: list[bytes] = []
        """Frames of a stream that must be stored before the next chunk."""

    def begin(self, reply: GateReply | None) -> None:
        self.number, self._granted = (self.job.delivery, False) if reply is None else (reply.attempt, True)
        self._began = monotonic()
        self.send(FrameKind.STARTED, 0, self._context.started)

    def request(self, kind: FrameKind, on_reply: OnReply, *, counted: bool = True, code: str = "") -> None:
        env, context = self.envelope, self._context
        progress = self.progress
        if progress is not None:
            progress = progress.model_copy(update={"preview": None})
        request = GateRequest(
            kind=kind,
            job=env.job,
            run=env.run,
            delivery=self.job.delivery,
            token=self._token,
            owner=env.owner,
            key=env.key,
            worker=context.worker,
            backend=context.backend,
            progress=progress,
            counted=counted,
            code=code[:100],
            sealed=env.sealed,
        )
        self._job_log.request_gate(request, on_reply)

    def close(self) -> None:
        self._events.close()

    # Output

    def send(self, kind: FrameKind, seq: int, payload: bytes) -> None:
        if not self.job.owned:
            raise JobLost
        frame = Frame(kind, self.envelope.run, self.job.delivery, seq, self._token, payload)
        if self.key is not None and kind not in OPEN_KINDS:
            self._events.append(seal_frame(self.key, self.envelope.job, frame))
        else:
            self._events.append(encode_frame(*frame[:6]))

    def take(self, data: bytes) -> bool:
        if self._first_output is None:
            self._first_output = monotonic()
        self._buffered.append(data)
        self._buffered_size += len(data)
        if self.envelope.stream:
            self._store_chunk(data)
        return bool(self._pending_frames) or self._events.is_full or self._overflows

    def _store_chunk(self, data: bytes) -> None:
        if is_sse(self.envelope.stream_type):
            frames = split_sse_frames(data)
        else:
            frames = [data[start : start + MAX_FRAME_BYTES] for start in range(0, len(data), MAX_FRAME_BYTES)]
        if any(len(frame) > INLINE_LIMIT_BYTES for frame in frames):
            self._pending_frames = frames
            return
        for frame in frames:
            self.send_next(FrameKind.CHUNK, frame)

    async def flush(self) -> None:
        pending, self._pending_frames = self._pending_frames, []
        for frame in pending:
            if len(frame) <= INLINE_LIMIT_BYTES:
                self.send_next(FrameKind.CHUNK, frame)
                continue
            writer = self._blobs.writer(ttl_s=self.envelope.keep_s, owner=self.envelope.owner)
            try:
                await writer.write(frame)
                info = await writer.close()
            except BaseException:
                await writer.abort()
                raise
            self.send_next(FrameKind.BLOB, BlobRef(name=info.name, size=info.size).model_dump_json().encode())
        if self._overflows:
            await self._move_answer()
        if self._events.is_full:
            await self._events.flush()

    async def _move_answer(self) -> None:
        env = self.envelope
        await self._move_to_blob(env.keep_s, env.stream_type if env.stream else "application/json")

    async def complete(self, finish: Finish) -> str:
        env = self.envelope
        if self._writer is not None:
            await self._move_answer()
        payload, ref = b"".join(self._buffered), await self._close_writer()
        await self._events.flush()
        outcome = self._make_outcome(
            JobStatus.COMPLETED,
            content_type=env.stream_type if env.stream else finish.content_type,
            usage=finish.usage,
            media=finish.media,
            adapted=self.adapted,
            size=self._buffered_size,
            blob=ref,
        )
        if self.key is not None:
            outcome, payload = seal_result(self.key, outcome, payload)
        first = await self._store_outcome(outcome, payload)
        if not first and ref is not None:
            self._blobs.remove(ref.name)
        self.job.ack()
        return "completed" if first else "cancelled"

    # The end. The job's ownership bounds the attempts to store it.

    def retry_delay_s(self) -> float | None:
        return backoff_s(self.number) if self.number < MAX_TRANSIENT_FAILURES else None

    async def fail(self, error: NexusError, *, dead: bool) -> str:
        error = self._storable(error)
        message = self.job.message if len(self.job.message) <= MAX_STORED_MESSAGE_BYTES else b""
        outcome = self._make_outcome(JobStatus.FAILED, error=error.info, dead=dead)
        if dead:
            await self._retry_until_stored(lambda: self._job_log.store_dead_letter(outcome, message))
        await self._store_outcome(outcome, message)
        self.job.ack()
        return "failed"

    async def return_job(self, error: NexusError, delay_s: float, *, counted: bool) -> str:
        error = self._storable(error)
        if self._began is not None:
            self.send_next(FrameKind.RETURNED, returned_payload(error, counted=counted))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETURN_TIMEOUT_S):
                    await self._events.flush()
        code = error.info.code or error.info.type
        self.request(FrameKind.RETURNED, lambda _: None, counted=counted, code=code)
        self.job.nak(delay_s)
        return "returned"

    def _storable(self, error: NexusError) -> NexusError:
        """Return the error of a sealed job without the server's words, which may repeat the request."""
        if not self.envelope.sealed or not isinstance(error, BackendError):
            return error
        return NexusError.from_info(error.info.model_copy(update={"message": HIDDEN_MESSAGE}))

    def _make_outcome(self, status: JobStatus, **fields: Any) -> Outcome:
        began = self._began
        return outcome_of(
            self.envelope,
            status,
            token=self._token,
            delivery=self.job.delivery,
            events=0 if began is None else self._seq + 1,
            worker=self._context.worker,
            attempts=self.number,
            granted=self._granted,
            seconds=0.0 if began is None else round(monotonic() - began, 4),
            first_output_s=None
            if began is None or self._first_output is None
            else round(self._first_output - began, 4),
            input_size=self.input_bytes,
            **fields,
        )

    async def _store_outcome(self, outcome: Outcome, payload: bytes) -> bool:
        """Store the outcome. Return False where another outcome was first, and a gateway confirms that it counts."""
        while not await self._retry_until_stored(lambda: self._job_log.store_outcome(outcome, payload)):
            replied: asyncio.Future[GateReply | None] = asyncio.get_running_loop().create_future()
            self.request(FrameKind.HEARTBEAT, partial(_set_result, replied))
            reply = await replied
            if reply is not None and reply.kind is GateVerdict.STOP:
                return False
            if (reply is not None and reply.kind is GateVerdict.SUPERSEDED) or not self.job.owned:
                raise JobLost
            await asyncio.sleep(STORE_RETRY_S)
        return True

    async def _retry_until_stored(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Repeat a call that NATS does not confirm, as long as the job belongs to this worker. Raises JobLost."""

        def on_error(error: Exception) -> None:
            env = self.envelope
            log.warning("attempt.outcome_not_stored", error=str(error), job=env.job, request_id=env.request_id)
            if not self.job.owned:
                raise JobLost

        return await retry(call, on=Unavailable, backoff=Backoff(STORE_RETRY_S), on_error=on_error)


def _set_result(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)
