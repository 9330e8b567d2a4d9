"""One attempt at one job: ask whether the caller is there, run the backend, pass its output on, say how it ended.

begun ──GO; or the job is──► running ──Finish──────────► DONE, ack
  │     fresh: no answer yet     │ nobody listens, no GO ─► give back, to wait for GO next time
  │                              │ permanent error ──────► FAILED, ack
  │                              │ transient error ──────► RETURNED, give back   (only while nothing was shown; the gateway
  │                              │                         ends the request after three that count)
  │                              │ time limit ───────────► FAILED, ack
  │                              │ cancelled, GONE, nobody there ──► ack
  │                              │ STALE, `ack_wait` lost ─────────► silence
  │                              └ drain ran out of time ──────────► RETURNED, give back
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, partial
from time import monotonic
from typing import cast

import structlog

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobStore, BlobWriter
from backbone.bus.bus import JobDelivery, WorkerBus
from schemas.errors import WORKER_DRAINED, DeadlineExceeded, ErrorInfo, NexusError, Unavailable
from schemas.frames import (
    LOADING_PHASE,
    MAX_PREVIEW,
    PROCEED,
    STOP,
    AdaptedParameters,
    AttemptDone,
    AttemptReturned,
    AttemptStarted,
    BlobRef,
    FrameKind,
    Progress,
    encode_frame,
)
from schemas.jobs import Envelope
from workers.adapter_kit.http_client import GATEWAY_HOPS
from workers.backends.base import (
    Adaptation,
    Backend,
    BackendError,
    BackendUnavailable,
    Chunk,
    Finish,
    Output,
    Task,
    UploadedFile,
    wrap_exception,
)
from workers.gateway_health import GatewayHealth

log = structlog.get_logger(__name__)

MAX_FRAME = 256 * 1024
"""Payload bytes in one event; larger output travels in several."""
GRANT_TRY_S = 0.8
GRANT_TRIES = 4
"""How often a gateway is asked about a job that has waited in its queue. One that says nothing at all is frozen or cut off, and
may be back before its callers leave: the job begins then.
"""
ASK_AGAIN_S = 0.25
ASK_TRIES = 10
"""A gateway that nobody hears for this many questions is gone; fewer, and it may only be reconnecting."""
ANSWER_TTL_S = 1800.0
"""For the gateway to pass on an answer that travels by reference; it removes it then."""
KEPT = "nexus-blob:"
"""Before the name of a blob that the caller gets by URL; the gateway knows which."""
MAX_TRANSIENT = 3
"""Counted attempts after which a transient backend error is final; of a direct job its gateway counts them."""
UNCOUNTED_S = 0.05
"""The pause before another worker gets a job that this one's server has not begun."""
CLOSE_S = 10.0
"""How long a cancelled backend call may take to end before its slot is freed anyway."""


class StopReason(StrEnum):
    """Why an attempt is stopped from outside."""

    GONE = "caller gone"
    STALE = "another delivery has begun"
    UNHEARD = "nobody listens for its gateway"
    CANCELLED = "cancelled"
    LOST = "held longer than ack_wait"
    DRAINED = "worker drained"
    FIRST_TOKEN = "no first token in time"
    IDLE = "the backend fell silent"
    TOTAL = "total time limit"
    LOAD = "the model was not loaded in time"


SILENT = frozenset({StopReason.STALE, StopReason.LOST})
FORGET = frozenset({StopReason.GONE, StopReason.CANCELLED})


@dataclass(frozen=True)
class WorkerContext:
    """Who runs the attempt."""

    worker: str
    backend: str
    gateways: GatewayHealth = field(default_factory=GatewayHealth, compare=False)
    adapts: bool = True
    """What its server lacks is replaced by the nearest equivalent, where the job's alias does not say; False: refused."""

    @cached_property
    def started(self) -> bytes:
        """What STARTED says."""
        return AttemptStarted(worker=self.worker, backend=self.backend).model_dump_json().encode()


class Attempt:
    """See the module's docstring."""

    def __init__(
        self,
        bus: WorkerBus,
        blobs: BlobStore,
        backend: Backend,
        who: WorkerContext,
        job: JobDelivery,
        envelope: Envelope,
        body: bytes,
    ) -> None:
        self._bus = bus
        self._blobs = blobs
        self._backend = backend
        self._who = who
        self.job = job
        self.envelope = envelope
        self._body = body
        self._loop = asyncio.get_running_loop()
        self.began = self.last_output = self._phase_began = monotonic()
        self._seq = 0
        self._tokens = 0
        self._shown = False
        self._held: list[bytes] = []
        """An answer that is not streamed, as long as it is small."""
        self._held_size = 0
        self._writer: BlobWriter | None = None
        """Takes the answer once it is not."""
        self._loading = False
        self._alive = False
        """The backend has said that it works, though nothing came of it yet."""
        self._stop: StopReason | None = None
        self._stopped_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._ticket = 0
        self._asked = 0
        self._known = False
        """The gateway has said GO."""
        self._gateway = envelope.reply.rpartition(".")[0]
        self._waiting: asyncio.Future[None] | None = None
        """Done once the gateway has said GO, where the backend waits for that."""
        self._grant_timer: asyncio.TimerHandle | None = None
        self.outcome = "running"
        self.adapted: tuple[str, ...] = ()
        """Parameters of the request that were replaced by their nearest equivalent."""
        self.error: ErrorInfo | None = None
        self.failure: BackendError | None = None
        """How the backend failed, where it did."""
        self._log = log.bind(
            request_id=envelope.request_id,
            job=envelope.job,
            run=envelope.run,
            delivery=job.delivery,
            model=envelope.model,
        )

    @property
    def answers(self) -> bool:
        """Whether the backend has begun to answer: the model is loaded."""
        return not self._loading and (self._tokens > 0 or self._alive)

    async def run(self) -> None:
        """Run to the end; never raises."""
        self._task = asyncio.current_task()
        if self.envelope.hops:
            GATEWAY_HOPS.set(self.envelope.hops)
        try:
            if self._stop is None:
                # A job that has waited may be one of a gateway that died meanwhile: its caller is gone, and it must not run.
                if self.job.fresh and not self._who.gateways.is_doubtful(self._gateway):
                    self._ask()
                else:
                    await self._start_grant()
                await self._work()
        except asyncio.CancelledError:
            if self._stop is None:
                raise
        except Exception as error:
            self._failed(error)
        finally:
            self._bus.cancel_request(self._ticket)
            if self._grant_timer is not None:
                self._grant_timer.cancel()
        if self._stop is not None:
            self._stopped(self._stop)

    def stop(self, why: StopReason) -> None:
        """End the backend call; the first reason counts."""
        if self._stop is None and self.outcome == "running":
            self._stop = why
            self._stopped_at = monotonic()
            if self._task is not None:
                self._task.cancel()

    def watch(self, now: float) -> None:
        """Hold the attempt to its time limits, and to its ownership of the job."""
        limits = self.envelope.limits
        if self.outcome == "completed":
            if now - self.last_output > CLOSE_S and self._task is not None:
                self._task.cancel()
        elif self._stop is not None:
            if now - self._stopped_at > CLOSE_S and self._task is not None:
                self._task.cancel()  # its backend does not let go
        elif not self.job.owned:
            self.stop(StopReason.LOST)
        elif self._loading:
            if now - self._phase_began > limits.load_s:
                self.stop(StopReason.LOAD)
        elif now - self._phase_began > limits.total_s:
            self.stop(StopReason.TOTAL)
        elif not (self._tokens or self._alive):
            if now - self._phase_began > limits.first_token_s:
                self.stop(StopReason.FIRST_TOKEN)
        elif now - self.last_output > limits.idle_s:
            self.stop(StopReason.IDLE)

    def beat(self) -> None:
        """Keep the job, tell the gateway that the attempt lives, and learn whether the caller is still there."""
        self.job.extend()
        if self._known:
            self._put_question(encode_frame(FrameKind.HEARTBEAT, self.job.delivery, self._seq))

    # The question

    def _ask(self) -> None:
        self._asked += 1
        self._put_question(encode_frame(FrameKind.STARTED, self.job.delivery, 0, self._who.started))

    async def _start_grant(self) -> None:
        """Wait until the gateway says GO; whatever else it says stops the attempt."""
        self._waiting = waiting = self._loop.create_future()
        self._ask_until_granted(waiting, GRANT_TRIES)
        await waiting
        self._waiting = None
        self.began = self.last_output = self._phase_began = monotonic()

    def _ask_until_granted(self, waiting: asyncio.Future[None], tries: int) -> None:
        if waiting.done():
            return
        if tries:
            self._ask()
            self._grant_timer = self._loop.call_later(GRANT_TRY_S, self._ask_until_granted, waiting, tries - 1)
        else:
            waiting.set_result(None)

    def _put_question(self, frame: bytes) -> None:
        self._bus.cancel_request(self._ticket)
        try:
            self._ticket = self._bus.request(self.envelope.reply, frame, self._answered)
        except Unavailable:
            self._loop.call_later(ASK_AGAIN_S, self._ask_again)

    def _ask_again(self) -> None:
        if self.outcome == "running" and self._stop is None:
            self._ask()

    def _answered(self, answer: bytes | None) -> None:
        gateways = self._who.gateways
        if answer is not None:
            gateways.answered(self._gateway)
            if answer != PROCEED:
                self.stop(StopReason.GONE if answer == STOP else StopReason.STALE)
                return
            self._known, self._asked = True, 0
            if self._waiting is not None and not self._waiting.done():
                self._waiting.set_result(None)
            return
        gone = gateways.is_gone(self._gateway) or self._asked >= ASK_TRIES
        gateways.doubt(self._gateway, gone=gone)
        if gone:
            self.stop(StopReason.GONE)
        elif self._known or self._waiting is not None:
            self._loop.call_later(ASK_AGAIN_S, self._ask_again)
        else:
            self.stop(StopReason.UNHEARD)

    # The work

    async def _work(self) -> None:
        output = cast("AsyncGenerator[Output, None]", self._backend.run(await self._read_task()))
        try:
            async for piece in output:
                if isinstance(piece, Chunk):
                    if self._chunk(piece):
                        await self._spill()
                elif isinstance(piece, Progress):
                    self._progress(piece)
                elif isinstance(piece, Adaptation):
                    self._adapt(piece)
                else:
                    await self._finished(piece)
                    break
            else:
                raise BackendError("the backend's answer ended before it was complete", transient=True)
        finally:
            await self._close(output)

    async def _read_task(self) -> Task:
        """What the adapter gets; a body that travels by reference is read here, uploads when the adapter reads them."""
        env, body = self.envelope, self._body
        files: tuple[UploadedFile, ...] = ()
        if env.uploads:
            files, body = self._files(body)
        if env.body_blob is not None:
            body = b"".join([piece async for piece in self._blobs.read(env.body_blob)])
        return Task(
            env.job,
            env.request_id,
            env.capability,
            env.endpoint,
            env.model,
            env.public_model,
            env.stream,
            body,
            files,
            self._keep,
            self._who.adapts if not env.unsupported else env.unsupported == "adapt",
        )

    def _files(self, body: bytes) -> tuple[tuple[UploadedFile, ...], bytes]:
        """The uploads, and what is left of `body` without those that travel inline."""
        files: list[UploadedFile] = []
        at = start = len(body) if self.envelope.body_size is None else self.envelope.body_size
        for upload in self.envelope.uploads:
            pieces: Callable[[], AsyncIterator[bytes]]
            if upload.blob is not None:
                pieces = partial(self._blobs.read, upload.blob)
            else:
                pieces = partial(_one_piece, body[at : at + upload.size])
                at += upload.size
            files.append(UploadedFile(upload.field, upload.filename, upload.content_type, upload.size, pieces))
        return tuple(files), body[:start]

    async def _keep(self, data: bytes, content_type: str) -> str:
        env = self.envelope
        writer = self._blobs.writer(ttl_s=env.keep_s, content_type=content_type, owner=env.owner)
        try:
            await writer.write(data)
            return KEPT + (await writer.close()).name
        except BaseException:
            await writer.abort()
            raise

    async def _close(self, output: AsyncGenerator[Output, None]) -> None:
        """The slot stays taken until the backend has really stopped, within reason."""
        if self.outcome == "completed":
            # Bounded by `watch`: a time limit of its own would cost each job 4 µs.
            with contextlib.suppress(asyncio.CancelledError):
                await output.aclose()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                if self._writer is not None:
                    await self._writer.abort()
                await output.aclose()

    def _chunk(self, piece: Chunk) -> bool:
        """Pass it on, or hold it. True when what is held must go by reference first."""
        self._tokens += piece.tokens
        self._loading = False
        self.last_output = monotonic()
        data = piece.data
        if not data:
            return False
        if self.envelope.stream and len(data) <= INLINE_LIMIT_BYTES:
            self._shown = True
            self._chunks(data)
            return False
        self._held.append(data)
        self._held_size += len(data)
        return self._held_size > INLINE_LIMIT_BYTES or self._writer is not None

    def _progress(self, progress: Progress) -> None:
        """Also a sign of life: it counts as output, unless it only says that the model is being loaded or is there now."""
        now = monotonic()
        loading = progress.phase == LOADING_PHASE
        if self._loading is not loading:
            self._phase_began = now  # loading, and what follows it, have limits of their own
            self._alive = False
        elif not loading:
            self._alive = True
        self._loading = loading
        self.last_output = now
        if progress.preview is not None and len(progress.preview) > MAX_PREVIEW:
            progress = progress.model_copy(update={"preview": None})
        self._next(FrameKind.PROGRESS, progress.model_dump_json(exclude_none=True).encode())

    def _adapt(self, adapted: Adaptation) -> None:
        """Tell the caller which parameters were replaced."""
        self.adapted = adapted.parameters
        payload = AdaptedParameters(parameters=adapted.parameters).model_dump_json().encode()
        self._next(FrameKind.ADAPTED, payload)

    async def _spill(self) -> None:
        """Move what is held to a blob. Of a stream, that is one piece; otherwise the answer so far."""
        if self._writer is None:
            self._writer = self._blobs.writer(ttl_s=ANSWER_TTL_S, owner=self.envelope.owner)
        held, self._held, self._held_size = self._held, [], 0
        for data in held:
            await self._writer.write(data)
            self.last_output = monotonic()
        if self.envelope.stream:
            ref = await self._close_writer()
            self._shown = True
            self._next(FrameKind.BLOB, ref.model_dump_json().encode())

    async def _close_writer(self) -> BlobRef:
        assert self._writer is not None
        info = await self._writer.close()
        self._writer = None
        return BlobRef(name=info.name, size=info.size)

    def _chunks(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_FRAME):
            self._next(FrameKind.CHUNK, data[start : start + MAX_FRAME])

    async def _finished(self, finish: Finish) -> None:
        ref: BlobRef | None = None
        if self._writer is not None:
            ref = await self._close_writer()
        held = self._held
        tail = held[0] if len(held) == 1 else b"".join(held)
        if len(tail) > MAX_FRAME:
            self._chunks(tail)
            tail = b""
        done = AttemptDone(content_type=finish.content_type, usage=finish.usage, tokens=self._tokens, blob=ref)
        self._next(FrameKind.DONE, done.model_dump_json(exclude_none=True).encode() + b"\n" + tail)
        self.job.ack()
        self.outcome = "completed"
        self.last_output = monotonic()

    # The end

    def _wrapped(self, error: Exception) -> tuple[NexusError, bool]:
        """The error as it travels, and whether another attempt may succeed."""
        wrapped = wrap_exception(error)
        if wrapped is not error:
            self._log.warning("attempt.unexpected_exception", exc_info=error)
        public = wrapped.info.redacted()
        if public is not wrapped.info:
            self._log.warning("attempt.error_hidden", error=wrapped.info.message)
            wrapped.info = public
        self.error = wrapped.info
        if isinstance(wrapped, BackendError):
            self.failure = wrapped
        return wrapped, wrapped.transient if isinstance(wrapped, BackendError) else isinstance(wrapped, Unavailable)

    def _failed(self, error: Exception) -> None:
        wrapped, transient = self._wrapped(error)
        if not transient or self._shown:
            self._end(wrapped)
        elif self._counts(wrapped):
            self._return(wrapped, 0.2 * min(self.job.delivery, MAX_TRANSIENT))
        else:
            self._return(wrapped, UNCOUNTED_S, counted=False)

    def _counts(self, error: NexusError) -> bool:
        """Whether the attempt counts as a failed one: not where the server asked to wait, or saw nothing of the request."""
        if not isinstance(error, BackendUnavailable) or self._tokens or self._alive:
            return True
        return error.pause_s is None and not error.unsent

    def _stopped(self, why: StopReason) -> None:
        limits = self.envelope.limits
        if why in SILENT:
            self.outcome = "fenced"
        elif why in FORGET:
            self.job.ack()
            self.outcome = "cancelled"
        elif why is StopReason.UNHEARD:
            self.job.nak(ASK_AGAIN_S)
            self.outcome = "returned"
        elif why is StopReason.DRAINED:
            self._return(Unavailable("the worker was shut down; the job goes to another one", code=WORKER_DRAINED), 0.0)
        elif why is StopReason.FIRST_TOKEN:
            self._end(
                DeadlineExceeded(f"the backend sent nothing within {limits.first_token_s:g} s (first-token limit)")
            )
        elif why is StopReason.IDLE:
            self._end(DeadlineExceeded(f"the backend fell silent for {limits.idle_s:g} s (idle limit)"))
        elif why is StopReason.LOAD:
            self._end(DeadlineExceeded(f"the backend did not load the model within {limits.load_s:g} s (load limit)"))
        else:
            self._end(DeadlineExceeded(f"the answer was not complete after {limits.total_s:g} s (total limit)"))

    def _end(self, error: NexusError) -> None:
        self.error = error.info
        self._next(FrameKind.FAILED, error.info.model_dump_json(exclude_none=True).encode())
        self.job.ack()
        self.outcome = "failed"

    def _return(self, error: NexusError, delay_s: float, *, counted: bool = True) -> None:
        self.error = error.info
        self._next(FrameKind.RETURNED, returned(error, counted=counted))
        self.job.nak(delay_s)
        self.outcome = "returned"

    def _next(self, kind: FrameKind, payload: bytes) -> None:
        self._seq += 1
        self._send(kind, self._seq, payload)

    def _send(self, kind: FrameKind, seq: int, payload: bytes = b"") -> None:
        if not self.job.owned:
            self.stop(StopReason.LOST)  # frozen or cut off for too long: the job is another worker's by now
            return
        with contextlib.suppress(Unavailable):
            self._bus.send_event(self.envelope.reply, encode_frame(kind, self.job.delivery, seq, payload))

    def report(self, ended: float) -> None:
        """Write the log line."""
        seconds = round(ended - self.began, 4)
        fields = {"outcome": self.outcome, "seconds": seconds, "tokens": self._tokens}
        if self._stop is not None:
            fields["why"] = self._stop.value
        if self.error is not None:
            self._log.warning("attempt.finished", error=self.error.message, code=self.error.code, **fields)
        else:
            self._log.info("attempt.finished", **fields)


def returned(error: NexusError, *, counted: bool) -> bytes:
    """What RETURNED says."""
    info = error.info if counted else AttemptReturned(**error.info.model_dump(), counted=False)
    return info.model_dump_json(exclude_none=True).encode()


async def _one_piece(data: bytes) -> AsyncIterator[bytes]:
    yield data
