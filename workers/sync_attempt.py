"""One attempt at a direct job, whose gateway waits: run the backend, send its output and the end.

A fresh job starts at once. Its first frame says so; an attempt that still runs after START_REQUEST_DELAY_S asks for its start grant then,
which tells whether the caller still waits. Any other job waits for the grant, as its gateway may be dead.

requested ──PROCEED; or the job──► running ──Finish─────────► DONE, ack
  │         is fresh                  │ gateway unreachable, no PROCEED ─► nak, to wait for PROCEED next time
  │                                   │ permanent error ─────► FAILED, ack
  │                                   │ transient error ─────► RETURNED, nak   (only before the first output; the gateway
  │                                   │                        ends the request after three that count)
  │                                   │ time limit ──────────► FAILED, ack
  │                                   │ cancelled, STOP, gateway disconnected ──► ack
  │                                   │ SUPERSEDED, `ack_wait` lost ────► silence
  │                                   └ drain ran out of time ──────────► RETURNED, nak
"""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobStore
from backbone.bus.bus import JobDelivery, WorkerBus
from schemas.errors import NexusError, Unavailable
from schemas.frames import PROCEED, STOP, AttemptDone, BlobRef, FrameKind, encode_first_frame, encode_frame
from schemas.jobs import Envelope
from workers.adapter_kit.http_client import GATEWAY_HOPS
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

GRANT_RETRY_S = 0.8
MAX_GRANT_REQUESTS = 4
"""How often a gateway is asked about a job that has waited in its queue. A gateway that sends no answer at all is frozen or cut off, and
may be back before its callers disconnect: the job starts then.
"""
ANSWER_TTL_S = 1800.0
"""How long an answer that travels by reference is stored for the gateway, which removes it after passing it on."""


class SyncAttempt(Attempt):
    """An attempt at a direct job. `run` never raises but for a cancellation from outside."""

    def __init__(
        self,
        bus: WorkerBus,
        blobs: BlobStore,
        backend: Backend,
        context: WorkerContext,
        job: JobDelivery,
        envelope: Envelope,
        body: bytes,
    ) -> None:
        super().__init__(bus, blobs, backend, context, job, envelope, body)
        self._token = next(context.tokens)
        self._announced = False
        """The gateway has been sent the start of this attempt."""
        self._ticket = 0
        self._requests = 0
        """Requests to the gateway without an answer."""
        self._granted = False
        """The gateway has answered PROCEED."""
        self._gateway = envelope.reply.rpartition(".")[0]
        self._grant: asyncio.Future[None] | None = None
        """Done once the gateway has answered PROCEED, where the backend waits for that."""
        self._grant_timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Run to the end; never raises."""
        self._task = asyncio.current_task()
        if self.envelope.hops:
            GATEWAY_HOPS.set(self.envelope.hops)
        try:
            if self._stop_reason is None:
                # The gateway of a job that has waited may be dead: its caller is gone then, and the job must not run.
                if self.job.fresh and not self._context.gateways.is_suspect(self._gateway):
                    self._context.start_timer.add(self.request_start)
                else:
                    await self._wait_for_grant()
                await self._work()
        except asyncio.CancelledError:
            if self._stop_reason is None:
                raise
        except Exception as error:
            self._fail(error)
        finally:
            self._bus.cancel_request(self._ticket)
            if self._grant_timer is not None:
                self._grant_timer.cancel()
        if self._stop_reason is not None:
            self._end_stopped(self._stop_reason)

    def send_heartbeat(self) -> None:
        """Extend the ownership of the job, tell the gateway that the attempt runs, and learn whether the caller still waits."""
        self.job.extend()
        if self._granted:
            self._request(self._encode(FrameKind.HEARTBEAT, self._seq))

    # Requests to the gateway

    def request_start(self) -> None:
        """Ask for the start grant, if the attempt still runs."""
        if self.outcome == "running" and self._stop_reason is None:
            self._request_start()

    def _request_start(self) -> None:
        self._requests += 1
        if self._request(self._encode(FrameKind.STARTED, 0, self._context.started)):
            self._announced = True

    async def _wait_for_grant(self) -> None:
        """Wait until the gateway answers PROCEED; any other answer stops the attempt."""
        self._grant = grant = self._loop.create_future()
        self._request_until_granted(grant, MAX_GRANT_REQUESTS)
        await grant
        self._grant = None
        self.began = self.last_output = self._phase_began = monotonic()

    def _request_until_granted(self, grant: asyncio.Future[None], requests: int) -> None:
        if grant.done():
            return
        if requests:
            self._request_start()
            self._grant_timer = self._loop.call_later(GRANT_RETRY_S, self._request_until_granted, grant, requests - 1)
        else:
            grant.set_result(None)

    def _request(self, frame: bytes) -> bool:
        """Send a request; return False where it could not be sent, and is repeated later."""
        self._bus.cancel_request(self._ticket)
        try:
            self._ticket = self._bus.request(self.envelope.reply, frame, self._on_answer)
        except Unavailable:
            self._loop.call_later(REQUEST_RETRY_S, self.request_start)
            return False
        return True

    def _on_answer(self, answer: bytes | None) -> None:
        gateways = self._context.gateways
        if answer is not None:
            gateways.record_answer(self._gateway)
            if answer != PROCEED:
                self.stop(StopReason.DISCONNECTED if answer == STOP else StopReason.SUPERSEDED)
                return
            self._granted, self._requests = True, 0
            if self._grant is not None and not self._grant.done():
                self._grant.set_result(None)
            return
        disconnected = gateways.is_dead(self._gateway) or self._requests >= MAX_REQUESTS
        gateways.record_silence(self._gateway, disconnected=disconnected)
        if disconnected:
            self.stop(StopReason.DISCONNECTED)
        elif self._granted or self._has_output or self._grant is not None:
            self._loop.call_later(REQUEST_RETRY_S, self.request_start)
        else:
            self.stop(StopReason.GATEWAY_UNREACHABLE)

    # Output

    def _take_chunk(self, chunk: Chunk) -> bool:
        """Send output, or buffer it. Return True when the buffer must move to a blob first."""
        self._tokens += chunk.tokens
        self._loading = False
        self.last_output = monotonic()
        data = chunk.data
        if not data:
            return False
        if self.envelope.stream and len(data) <= INLINE_LIMIT_BYTES:
            self._has_output = True
            self._send_chunks(data)
            return False
        self._buffered.append(data)
        self._buffered_size += len(data)
        return self._buffered_size > INLINE_LIMIT_BYTES or self._writer is not None

    async def _flush_output(self) -> None:
        """Move the buffer to a blob. Of a stream, the buffer is one piece; otherwise the answer so far."""
        if self._writer is None:
            self._writer = self._blobs.writer(ttl_s=ANSWER_TTL_S, owner=self.envelope.owner)
        buffered, self._buffered, self._buffered_size = self._buffered, [], 0
        for data in buffered:
            await self._writer.write(data)
            self.last_output = monotonic()
        if self.envelope.stream:
            ref = await self._close_writer()
            self._has_output = True
            self._send_next(FrameKind.BLOB, ref.model_dump_json().encode())

    def _send_chunks(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_FRAME_BYTES):
            self._send_next(FrameKind.CHUNK, data[start : start + MAX_FRAME_BYTES])

    async def _complete(self, finish: Finish) -> None:
        ref: BlobRef | None = None
        if self._writer is not None:
            ref = await self._close_writer()
        buffered = self._buffered
        tail = buffered[0] if len(buffered) == 1 else b"".join(buffered)
        if len(tail) > MAX_FRAME_BYTES:
            self._send_chunks(tail)
            tail = b""
        done = AttemptDone(content_type=finish.content_type, usage=finish.usage, tokens=self._tokens, blob=ref)
        self._send_next(FrameKind.DONE, done.model_dump_json(exclude_none=True).encode() + b"\n" + tail)
        self.job.ack()
        self.outcome = "completed"
        self.last_output = monotonic()

    def _send(self, kind: FrameKind, seq: int, payload: bytes = b"") -> None:
        if not self.job.owned:
            self.stop(StopReason.OWNERSHIP_LOST)  # frozen or cut off for too long: the job is another worker's by now
            return
        if self._announced:
            frame = self._encode(kind, seq, payload)
        else:
            self._announced = True
            frame = encode_first_frame(
                kind, self.envelope.run, self.job.delivery, seq, self._token, payload,
                started=self._context.started, elapsed_us=int(1e6 * (monotonic() - self.began)),
            )  # fmt: skip
        with contextlib.suppress(Unavailable):
            self._bus.send_event(self.envelope.reply, frame)

    def _encode(self, kind: FrameKind, seq: int, payload: bytes = b"") -> bytes:
        return encode_frame(kind, self.envelope.run, self.job.delivery, seq, self._token, payload)

    # The end

    def _fail(self, error: Exception) -> None:
        wrapped, transient = self._wrap_error(error)
        if not transient or self._has_output:
            self._end(wrapped)
        elif self._counts_as_failure(wrapped):
            self._return_job(wrapped, 0.2 * min(self.job.delivery, MAX_TRANSIENT_FAILURES))
        else:
            self._return_job(wrapped, UNCOUNTED_RETURN_S, counted=False)

    def _end(self, error: NexusError) -> None:
        self.error = error.info
        self._send_next(FrameKind.FAILED, error.info.model_dump_json(exclude_none=True).encode())
        self.job.ack()
        self.outcome = "failed"

    def _return_job(self, error: NexusError, delay_s: float, *, counted: bool = True) -> None:
        self.error = error.info
        self._send_next(FrameKind.RETURNED, returned_payload(error, counted=counted))
        self.job.nak(delay_s)
        self.outcome = "returned"
