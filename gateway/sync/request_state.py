"""State machine of one synchronous request, from its submission to the last byte of its answer.

A frame of the attempt that counts, next in order (`ACTIONS`):

| frame | request is QUEUED or RUNNING | ENDED |
|---|---|---|
| HEARTBEAT | RUNNING; answers PROCEED | answers STOP |
| CHUNK, BLOB, PROGRESS, ADAPTED | RUNNING; for the caller | STOP |
| DONE, FAILED | ENDED | STOP |
| RETURNED | QUEUED; ENDED with an error after `MAX_STARTS`, or if output was delivered | STOP |

Every other frame (`_apply`, `_on_started`):

| frame | request is QUEUED or RUNNING | ENDED |
|---|---|---|
| STARTED of the next delivery | RUNNING; answers PROCEED; ENDED with an error after `MAX_STARTS`, or if output was delivered | STOP |
| STARTED of the attempt that counts | answers PROCEED | STOP |
| any frame of an older delivery, or of another attempt | answers SUPERSEDED | SUPERSEDED; STARTED of the same delivery: STOP |
| behind a gap | ENDED with an error | STOP |

Without a frame: a silent worker makes a request QUEUED, or ends it if output was delivered; a disconnect, a time limit and a refusal of
its job end it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from enum import Enum, auto
from functools import lru_cache
from time import monotonic
from typing import cast

import structlog

from backbone.bus.bus import GatewayBus, Queue
from gateway.http.unread_budget import UnreadBudget
from gateway.traces import RequestTrace
from schemas.control import Control, ControlOp
from schemas.errors import WORKER_DRAINED, BackendFailed, DeadlineExceeded, ErrorInfo, NexusError, Unavailable
from schemas.frames import (
    LOADING_PHASE,
    PROCEED,
    STOP,
    SUPERSEDED,
    AdaptedParameters,
    AttemptDone,
    AttemptReturned,
    AttemptStarted,
    BlobRef,
    Frame,
    FrameKind,
    Progress,
    decode_frame,
)
from schemas.job_events import GateReply, GateVerdict
from schemas.jobs import MAX_STARTS, Envelope

log = structlog.get_logger(__name__)

MAX_UNREAD_BYTES = 8 * 1024 * 1024
"""Output that may be buffered for a caller that reads too slowly."""
REPORT_STEP_BYTES = 16 * 1024
"""Growth of the buffered output at which it is reported to the process's `UnreadBudget`."""
SILENCE_GRACE_S = 2.0
"""Time beyond the ack wait in which a worker's next event may still come."""

_STARTED, _HEARTBEAT = FrameKind.STARTED.value, FrameKind.HEARTBEAT.value


class RequestState(Enum):
    """State of a synchronous request."""

    QUEUED = auto()
    RUNNING = auto()
    ENDED = auto()


class SyncRequest:
    """Follows the events of one job and buffers its output; the bus calls it as a `ReplyListener`."""

    __slots__ = (
        "_abandoned",
        "_ack_wait_s",
        "_bus",
        "_loading_s",
        "_pieces",
        "_reported",
        "_seq",
        "_size",
        "_token",
        "_unread",
        "_waiter",
        "adapted",
        "backend",
        "content_key",
        "delivered",
        "delivery",
        "direct_writer",
        "done",
        "envelope",
        "error",
        "first_output_at",
        "last_event_at",
        "loop",
        "on_end",
        "output_bytes",
        "pause_error",
        "progress",
        "queue",
        "queued_at",
        "return_error",
        "seq",
        "started_at",
        "starts",
        "state",
        "submitted_at",
        "trace",
        "worker",
    )  # fmt: skip

    def __init__(
        self, bus: GatewayBus, envelope: Envelope, ack_wait_s: float, unread: UnreadBudget | None = None
    ) -> None:
        self._bus = bus
        self._unread = unread
        self._reported = 0
        """Bytes of `_size` that `_unread` knows of."""
        self.envelope = envelope
        self.queue = Queue(envelope.capability, envelope.lane, envelope.model)
        self._ack_wait_s = ack_wait_s
        self.loop = asyncio.get_running_loop()
        self.content_key = ""
        """Of a sealed request: goes to the worker with the start grant, and exists nowhere else."""
        self._pieces: list[bytes | BlobRef] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._seq = 0
        self._token = ""
        """Name of the attempt whose frames count."""
        self._abandoned = False
        self._loading_s = 0.0
        self.state = RequestState.QUEUED
        self.delivered = False
        """Whether output of the current attempt was taken for the caller."""
        self.error: ErrorInfo | None = None
        self.return_error: ErrorInfo | None = None
        """Failure for which the latest attempt returned the job, until the next attempt starts."""
        self.pause_error: ErrorInfo | None = None
        """Reason why the latest attempt returned the job without counting: its server was unreachable, or asked to wait."""
        self.direct_writer: Callable[[bytes], bool] | None = None
        """Writes output to the caller at once while the handler waits, past the buffer. Returns False if it could not."""
        self.on_end: Callable[[], None] | None = None
        """Called once when the request has ended, if no handler waits."""
        self.progress: bytes | None = None
        """Newest `schemas.frames.Progress` of this attempt, as JSON."""
        self.adapted: tuple[str, ...] = ()
        """Parameters of the request that this attempt's worker replaced by their nearest equivalents."""
        self.done: AttemptDone | None = None
        self.seq: int | None = None
        """Sequence of the job's message in its stream; None until it is stored."""
        self.delivery = 0
        self.starts = 0
        self.worker = ""
        self.backend = ""
        self.submitted_at = self.queued_at = self.last_event_at = monotonic()
        self.started_at: float | None = None
        self.first_output_at: float | None = None
        self.trace: RequestTrace | None = None
        """Learns what the request's spans need; None: it is not traced."""
        self.output_bytes = 0
        """Bytes of output that the current attempt has sent, without those of its blobs."""

    # Called by the HTTP handler

    async def wait(self) -> None:
        """Wait until there is output to take, new progress, or the end of the request."""
        if self._pieces or self.state is RequestState.ENDED:
            return
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def wait_until_ended(self) -> None:
        """Wait until the request has ended."""
        while self.state is not RequestState.ENDED:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    @property
    def has_output(self) -> bool:
        """Whether output is buffered."""
        return bool(self._pieces)

    def take_output(self) -> bytes:
        """Return the buffered bytes before the first blob reference, and count them as delivered."""
        pieces = self._pieces
        if not pieces:
            return b""
        self.delivered = True
        first = pieces[0]
        if len(pieces) == 1 and not isinstance(first, BlobRef):
            self._pieces, self._size = [], 0
            if self._reported:
                self._report()
            return first
        inline: list[bytes] = []
        for piece in pieces:
            if isinstance(piece, BlobRef):
                break
            inline.append(piece)
        data = b"".join(inline)
        self._pieces = pieces[len(inline) :]
        self._size -= len(data)
        if self._reported:
            self._report()
        return data

    def take_blob(self) -> BlobRef | None:
        """Return the next piece of output if it is a blob reference; the handler then reads and removes the blob."""
        if self._pieces and isinstance(self._pieces[0], BlobRef):
            self.delivered = True
            return cast("BlobRef", self._pieces.pop(0))
        return None

    def take_unread_blobs(self) -> list[BlobRef]:
        """Drop the buffered output, and return its blob references for removal."""
        refs = [piece for piece in self._pieces if isinstance(piece, BlobRef)]
        self._drop_output()
        if self.done is not None and self.done.blob is not None:
            refs.append(self.done.blob)
        return refs

    def abandon(self) -> None:
        """End the request because its caller has disconnected: a queued job is deleted, a running one is cancelled."""
        if self.state is RequestState.ENDED:
            return
        running = self.state is RequestState.RUNNING
        self.state, self._abandoned = RequestState.ENDED, True
        if running:
            self._stop_worker()
        if self.seq is not None:
            self._bus.delete_job(self.seq)
            self._bus.release(self.envelope.reply)
        # Otherwise `on_stored` removes the job once its sequence is known.

    def fail(self, error: NexusError) -> None:
        """End the request with an error of the gateway, and cancel its attempt."""
        if self.state is RequestState.ENDED:
            return
        self.abandon()
        self.error = error.info
        self.wake()

    @property
    def owner(self) -> str:
        """The owner for whom the buffered bytes count."""
        return self.envelope.owner

    def shed(self) -> None:
        """Drop the buffered output of a caller that does not read, and end the stream with an error."""
        self._drop_output()
        error = Unavailable(
            "This stream was ended because its caller reads too slowly. Read faster, or use fewer streams at once.",
            code="slow_reader",
        )
        self.fail(error)
        self.error = error.info  # even if the worker is done: a stream with dropped output must not look complete
        self.wake()

    # Called by the bus

    @property
    def is_waiting(self) -> bool:
        """Whether no attempt is known to run."""
        return self.state is RequestState.QUEUED

    def on_stored(self, seq: int) -> None:
        """Note the job's sequence; delete the job if the request was abandoned meanwhile."""
        self.seq = seq
        if self.trace is not None:
            self.trace.note_stored()
        if self._abandoned:
            self._bus.delete_job(seq)
            self._bus.release(self.envelope.reply)

    def on_refused(self, error: NexusError) -> None:
        """End the request because its job is not stored. The job is not deleted: its sequence may be another job's by now."""
        if self.state is not RequestState.ENDED:
            self.error = error.info
        self._end()

    def on_event(self, data: bytes) -> bytes | None:
        """Apply one event frame. Returns the reply to a frame that asks whether the attempt may proceed."""
        try:
            frame = decode_frame(data)
        except ValueError:
            return None
        try:
            return self._apply(frame)
        except ValueError as error:
            # An unreadable event ends this request alone: raising here would end the connection to NATS.
            message = "" if self.content_key else str(error)  # it may repeat the answer
            log.error("request.event_unreadable", job=self.envelope.job, error=message)
            self.fail(
                BackendFailed("An event of this answer is malformed. Send the request again.", code="events_lost")
            )
            return None

    def _apply(self, frame: Frame) -> bytes | None:
        kind, _, delivery, seq, token, payload, started, elapsed_us = frame
        if kind == _STARTED:
            verdict = self._on_started(delivery, token, payload, 0)
            return self._with_key(verdict) if self.content_key else verdict
        if started:
            verdict = self._on_started(delivery, token, started, elapsed_us)
            if verdict is not PROCEED:
                return verdict
        if delivery < self.delivery or (delivery == self.delivery and token != self._token):
            return SUPERSEDED
        if self.state is RequestState.ENDED:
            return STOP
        self.last_event_at = monotonic()
        if delivery > self.delivery or seq != self._seq + (kind != _HEARTBEAT):
            self.fail(
                BackendFailed(
                    "Events of this answer were lost between worker and gateway. Send the request again.",
                    code="events_lost",
                )
            )
            return None
        self._seq = seq
        self.state = RequestState.RUNNING  # also after a silence, in which the worker was only cut off
        action = ACTIONS.get(kind)
        return action(self, payload) if action is not None else None

    def _with_key(self, verdict: bytes) -> bytes:
        if verdict is not PROCEED:
            return verdict
        return GateReply(kind=GateVerdict.PROCEED, key=self.content_key).model_dump_json(exclude_defaults=True).encode()

    def _on_started(self, delivery: int, token: str, payload: bytes, elapsed_us: int) -> bytes:
        if delivery < self.delivery:
            return SUPERSEDED
        if self.state is RequestState.ENDED:
            return STOP
        started = _read_started(payload)
        if delivery == self.delivery:
            # The same attempt asks after its first frame, or again. Another one: NATS was killed and forgot the first delivery.
            same = token == self._token and started.worker == self.worker
            return PROCEED if same else SUPERSEDED
        if self.delivered:
            self.fail(_lost_worker())
            return STOP
        if self.starts >= MAX_STARTS:
            self.fail(
                BackendFailed(
                    f"This request was started {self.starts} times, and each time its worker was lost.",
                    code="worker_lost",
                )
            )
            return STOP
        if self.trace is not None and self.state is RequestState.RUNNING:
            self.trace.note_lost(self.worker, self.delivery, self.started_at)
        self.worker, self.backend = started.worker, started.backend
        self._forget_output()
        self.return_error = self.pause_error = None
        self.delivery, self._token, self._seq = delivery, token, 0
        self.starts += 1
        self.state = RequestState.RUNNING
        self.last_event_at = now = monotonic()
        if self.started_at is None:
            self.started_at = max(self.submitted_at, now - elapsed_us / 1e6)
        return PROCEED

    def _on_heartbeat(self, _payload: bytes) -> bytes:
        return PROCEED

    def _on_blob(self, payload: bytes) -> None:
        self._append(BlobRef.model_validate_json(payload))
        self.wake()

    def _on_adapted(self, payload: bytes) -> None:
        self.adapted = AdaptedParameters.model_validate_json(payload).parameters

    def _on_progress(self, payload: bytes) -> None:
        self.progress = payload
        if Progress.model_validate_json(payload).phase == LOADING_PHASE:
            self._loading_s = self.envelope.limits.load_s
        self.wake()

    def _on_done(self, payload: bytes) -> None:
        head, _, tail = payload.partition(b"\n")
        self.done = AttemptDone.model_validate_json(head)
        if tail:
            self._add(tail)
        self._end()

    def _on_failed(self, payload: bytes) -> None:
        self.error = ErrorInfo.model_validate_json(payload)
        self._end()

    def _on_returned(self, payload: bytes) -> None:
        if self.delivered:
            self.fail(_lost_worker())
            return
        info = AttemptReturned.model_validate_json(payload)
        self._forget_output()
        if info.code == WORKER_DRAINED:
            self.starts -= 1
            self._wait_again()
        elif info.counted:
            self.return_error = info
            self._wait_again()
            if self.starts >= MAX_STARTS:
                self.fail(NexusError.from_info(info))
        else:
            # The limit on waiting goes on: a server may ask to wait any number of times.
            self.pause_error = info
            self.starts -= 1
            self.started_at = self.started_at if self.starts else None
            self.state = RequestState.QUEUED

    # The clock

    def check_deadlines(self, now: float) -> None:
        """End the request if it has exceeded a time limit. Called several times a second. `now`: by `monotonic`."""
        limits = self.envelope.limits
        if self.state is RequestState.QUEUED:
            if now - self.queued_at > limits.queue_s and self.pause_error is not None:
                self.fail(NexusError.from_info(self.pause_error))
            elif now - self.queued_at > limits.queue_s:
                self.fail(
                    DeadlineExceeded(
                        f"No worker took the request within {limits.queue_s:g} s (queue limit). Retry later.",
                        code="queue_timeout",
                    )
                )
        elif self.state is RequestState.RUNNING:
            if now - self.last_event_at > self._ack_wait_s + SILENCE_GRACE_S:
                self._on_silence()
            elif (
                self.started_at is not None
                and now - self.started_at > limits.total_s + self._loading_s + self._ack_wait_s
            ):
                self.fail(DeadlineExceeded(f"The answer was not complete after {limits.total_s:g} s (total limit)."))

    def _on_silence(self) -> None:
        """Wait for the next attempt, as the worker is dead or cut off; an answer that was partly delivered fails instead.

        Buffered output is kept until the next attempt starts: the gateway itself may have been cut off.
        """
        if self.trace is not None:
            self.trace.note_lost(self.worker, self.delivery, self.started_at)
        if self.delivered:
            self.fail(_lost_worker())
        else:
            self._wait_again()

    def _wait_again(self) -> None:
        self.state = RequestState.QUEUED
        self.queued_at = monotonic()

    # Output

    def _add(self, data: bytes) -> None:
        self.output_bytes += len(data)
        waiter = self._waiter
        # A handler that waits has sent all earlier output, so that `data` overtakes nothing.
        if self.direct_writer is not None and waiter is not None and not waiter.done() and self.direct_writer(data):
            self.delivered = True
            return
        self._append(data)
        self._size += len(data)
        if self._size > MAX_UNREAD_BYTES:
            # This is a stream: other answers of that size travel by reference.
            self.shed()
        elif self.envelope.stream:
            self.wake()
            if self._size - self._reported >= REPORT_STEP_BYTES:
                self._report()

    def _append(self, piece: bytes | BlobRef) -> None:
        if self.first_output_at is None:
            self.first_output_at = monotonic()
        self._pieces.append(piece)

    def _forget_output(self) -> None:
        self.progress = None
        self.adapted = ()
        self._drop_output()
        self.first_output_at = None
        self.output_bytes = 0

    def _drop_output(self) -> None:
        self._pieces, self._size = [], 0
        if self._reported:
            self._report()

    def _report(self) -> None:
        """Report the size of the buffered output to the process's budget, which may call `shed`."""
        if self._unread is not None:
            self._reported = self._size
            self._unread.record(self, self._size)

    def _end(self) -> None:
        """End the request whose job is done or refused."""
        self.state = RequestState.ENDED
        self._bus.release(self.envelope.reply)
        self.wake()

    def wake(self) -> None:
        """Wake the handler that waits, or call `on_end`."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        elif self.on_end is not None and self.state is RequestState.ENDED:
            on_end, self.on_end = self.on_end, None
            on_end()

    def _stop_worker(self) -> None:
        if not self.worker:
            return
        control = Control(op=ControlOp.CANCEL, job=self.envelope.job, run=self.envelope.run)
        self._bus.send_control(self.worker, control.model_dump_json().encode())


ACTIONS: Mapping[str, Callable[[SyncRequest, bytes], bytes | None]] = {
    FrameKind.HEARTBEAT.value: SyncRequest._on_heartbeat,
    FrameKind.CHUNK.value: SyncRequest._add,
    FrameKind.BLOB.value: SyncRequest._on_blob,
    FrameKind.PROGRESS.value: SyncRequest._on_progress,
    FrameKind.ADAPTED.value: SyncRequest._on_adapted,
    FrameKind.DONE.value: SyncRequest._on_done,
    FrameKind.FAILED.value: SyncRequest._on_failed,
    FrameKind.RETURNED.value: SyncRequest._on_returned,
}
"""What a frame of the attempt that counts does to a request that has not ended, by the frame's kind. Others are ignored."""


@lru_cache(maxsize=4096)
def _read_started(payload: bytes) -> AttemptStarted:
    """Parse `started`, cached: a worker sends the same bytes each time."""
    return AttemptStarted.model_validate_json(payload)


def _lost_worker() -> NexusError:
    return BackendFailed(
        "The worker was lost in the middle of this answer, which is not complete. Send the request again.",
        code="worker_lost",
    )
