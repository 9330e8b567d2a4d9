"""Output of an attempt at a direct job: frames to the gateway that waits, over core NATS.

A fresh job starts at once, unless it is sealed: its key comes with the start grant. Its first frame says so; an attempt that still runs after START_REQUEST_DELAY_S asks for its start grant then,
which tells whether the caller still waits. Any other job waits for the grant, as its gateway may be dead.
"""

from __future__ import annotations

import asyncio
import contextlib
from math import inf
from time import monotonic

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobStore
from backbone.bus.bus import JobDelivery, WorkerBus
from schemas.errors import NexusError, Unavailable
from schemas.frames import AttemptDone, FrameKind, encode_first_frame, encode_frame
from schemas.job_events import GateReply, GateVerdict, decode_reply
from schemas.jobs import Envelope
from workers.backends.base import Finish
from workers.outbox import (
    MAX_FRAME_BYTES,
    MAX_REQUESTS,
    MAX_TRANSIENT_FAILURES,
    JobLost,
    OnReply,
    Outbox,
    returned_payload,
)
from workers.worker_context import WorkerContext

RETURN_DELAY_S = 0.2
"""The pause after the first failure; after the next ones it is longer."""
ANSWER_TTL_S = 1800.0
"""How long an answer that travels by reference is stored for the gateway, which removes it after passing it on."""


class ReplyOutbox(Outbox):
    """The frames of one attempt at a direct job."""

    needs_gateway = True
    # A gateway that sends no answer at all is frozen or cut off, and may be back before its callers disconnect: the job starts then.
    grant_timeout_s = 3.2
    resend_s = 0.8
    report_interval_s = inf

    def __init__(
        self, bus: WorkerBus, blobs: BlobStore, context: WorkerContext, job: JobDelivery, envelope: Envelope
    ) -> None:
        super().__init__(blobs, job, envelope, next(context.tokens))
        self._bus = bus
        self._context = context
        self._gateway = envelope.reply.rpartition(".")[0]
        self._began = monotonic()
        self.starts_at_once = job.fresh and not envelope.sealed and not context.gateways.is_suspect(self._gateway)
        self._announced = False
        """The gateway has been sent the start of this attempt."""
        self._granted = False
        """The gateway has answered PROCEED."""
        self._may_wait = False
        """The caller has the first token: later ones may wait for each other."""
        self._requests = 0
        """Requests without an answer."""
        self._ticket = 0

    def begin(self, reply: GateReply | None) -> None:
        pass  # the first frame says that the attempt has started

    def request(self, kind: FrameKind, on_reply: OnReply) -> None:
        self._bus.cancel_request(self._ticket)
        self._requests += 1
        frame = (
            self._encode(kind, self._seq)
            if self._granted
            else self._encode(FrameKind.STARTED, 0, self._context.started)
        )
        try:
            self._ticket = self._bus.request(self.envelope.reply, frame, lambda data: on_reply(self._read_reply(data)))
            self._announced = True
        except Unavailable:
            asyncio.get_running_loop().call_soon(on_reply, None)

    def _read_reply(self, data: bytes | None) -> GateReply | None:
        gateways = self._context.gateways
        reply = decode_reply(data) if data is not None else None
        if reply is not None:
            gateways.record_answer(self._gateway)
            self._granted, self._requests = self._granted or reply.kind is GateVerdict.PROCEED, 0
            return reply
        is_dead = gateways.is_dead(self._gateway) or self._requests >= MAX_REQUESTS
        gateways.record_silence(self._gateway, disconnected=is_dead)
        if is_dead:
            return GateReply(kind=GateVerdict.STOP)
        if self._granted or self.has_output or not self.starts_at_once:
            return None
        return GateReply(kind=GateVerdict.WAIT)

    def close(self) -> None:
        self._bus.cancel_request(self._ticket)

    # Output

    def take(self, data: bytes) -> bool:
        if self.envelope.stream and len(data) <= INLINE_LIMIT_BYTES:
            self.has_output = True
            self._send_chunks(data)
            self._may_wait = self.tokens > 0
            return False
        self._buffered.append(data)
        self._buffered_size += len(data)
        return self._overflows

    async def flush(self) -> None:
        """Move the buffer to a blob. Of a stream, the buffer is one piece; otherwise the answer so far."""
        await self._move_to_blob(ANSWER_TTL_S)
        self._buffered_size = 0
        if self.envelope.stream and (ref := await self._close_writer()) is not None:
            self.has_output = True
            self.send_next(FrameKind.BLOB, ref.model_dump_json().encode())

    def _send_chunks(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_FRAME_BYTES):
            self.send_next(FrameKind.CHUNK, data[start : start + MAX_FRAME_BYTES])

    async def complete(self, finish: Finish) -> str:
        ref = await self._close_writer()
        buffered = self._buffered
        tail = buffered[0] if len(buffered) == 1 else b"".join(buffered)
        if len(tail) > MAX_FRAME_BYTES:
            self._send_chunks(tail)
            tail = b""
        done = AttemptDone(
            content_type=finish.content_type, usage=finish.usage, tokens=self.tokens, media=finish.media, blob=ref
        )
        self.send_next(FrameKind.DONE, done.model_dump_json(exclude_none=True).encode() + b"\n" + tail)
        self.job.ack()
        return "completed"

    def send(self, kind: FrameKind, seq: int, payload: bytes) -> None:
        if not self.job.owned:
            raise JobLost  # frozen or cut off for too long: the job is another worker's by now
        if self._announced:
            frame = self._encode(kind, seq, payload)
        else:
            self._announced = True
            frame = encode_first_frame(
                kind, self.envelope.run, self.job.delivery, seq, self._token, payload,
                started=self._context.started, elapsed_us=int(1e6 * (monotonic() - self._began)),
            )  # fmt: skip
        with contextlib.suppress(Unavailable):
            may_wait = self._may_wait and kind is FrameKind.CHUNK
            self._bus.send_event(self.envelope.reply, frame, may_wait=may_wait)

    def _encode(self, kind: FrameKind, seq: int, payload: bytes = b"") -> bytes:
        return encode_frame(kind, self.envelope.run, self.job.delivery, seq, self._token, payload)

    # The end

    def retry_delay_s(self) -> float | None:
        # The gateway counts the attempts.
        return None if self.has_output else RETURN_DELAY_S * min(self.job.delivery, MAX_TRANSIENT_FAILURES)

    async def fail(self, error: NexusError, *, dead: bool) -> str:  # noqa: ARG002 - no dead letter is stored
        self.send_next(FrameKind.FAILED, error.info.model_dump_json(exclude_none=True).encode())
        self.job.ack()
        return "failed"

    async def return_job(self, error: NexusError, delay_s: float, *, counted: bool) -> str:
        self.send_next(FrameKind.RETURNED, returned_payload(error, counted=counted))
        self.job.nak(delay_s)
        return "returned"
