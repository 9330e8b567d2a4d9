"""One attempt at one job: run the backend under time limits, and end in one outcome.

waiting ──PROCEED; no gateway replied; or──► running ──Finish────────────────────────► completed, ack
  │       a fresh direct job                   │ permanent error, time limit ────────► failed, ack
  │ STOP ───────► ack                          │ transient error, or the last drained ► returned, nak; failed after the third that
  │ WAIT ───────► nak                          │                                        counts, or after output that stays
  │ EXHAUSTED ──► failed, dead letter, ack     │ cancelled, STOP, caller disconnected ► ack
  └ SUPERSEDED ─► silence                      │ no gateway before any PROCEED ────────► nak, to wait for PROCEED next time
                                               └ SUPERSEDED, `ack_wait` lost ─────────► silence

An attempt sends its output and its end through an `Outbox`: to the gateway of a direct job, or to the streams of a durable one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from enum import StrEnum
from functools import cached_property, partial
from math import inf
from time import monotonic
from typing import Any, cast

import structlog

from backbone.bus.blobs import BlobStore
from backbone.bus.content_seals import ContentKey, open_request
from backbone.logging import log_info
from schemas.errors import WORKER_DRAINED, BackendFailed, DeadlineExceeded, ErrorInfo, NexusError, Unavailable
from schemas.frames import LOADING_PHASE, MAX_PREVIEW, AdaptedParameters, FrameKind, Progress
from schemas.job_events import GateReply, GateVerdict
from workers.adapter_kit.http_client import GATEWAY_HOPS
from workers.attempt_trace import AttemptTrace
from workers.backends.base import (
    Adaptation,
    Backend,
    BackendError,
    BackendUnavailable,
    Chunk,
    Output,
    Task,
    UploadedFile,
    wrap_exception,
)
from workers.outbox import MAX_REQUESTS, REQUEST_RETRY_S, JobLost, Outbox
from workers.worker_context import WorkerContext

log = structlog.get_logger(__name__)

STORED_FILE_PREFIX = "nexus-blob:"
"""Precedes the name of a blob that the caller gets by URL; the gateway recognizes it."""
KEY_RETRY_S = 1.0
"""The pause before another worker gets a sealed job whose key no gateway gave."""
UNCOUNTED_RETURN_S = 0.05
"""The pause before another worker gets a job that this worker's server has not begun."""
CLOSE_TIMEOUT_S = 10.0
"""How long a cancelled backend call may take to end before its slot is freed anyway."""


class StopReason(StrEnum):
    """Why an attempt is stopped from outside, as its log line says."""

    DISCONNECTED = "caller_disconnected"
    SUPERSEDED = "superseded_by_another_delivery"
    GATEWAY_UNREACHABLE = "gateway_unreachable"
    CANCELLED = "cancelled"
    OWNERSHIP_LOST = "held_longer_than_ack_wait"
    DRAINED = "worker_drained"
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    LOAD_TIMEOUT = "load_timeout"


FENCED_REASONS = frozenset({StopReason.SUPERSEDED, StopReason.OWNERSHIP_LOST})
"""The job is another worker's: the attempt ends silently."""
ABANDONED_REASONS = frozenset({StopReason.DISCONNECTED, StopReason.CANCELLED})
"""No caller wants the answer: the job is acknowledged."""
STOP_REASONS = {
    GateVerdict.STOP: StopReason.DISCONNECTED,
    GateVerdict.SUPERSEDED: StopReason.SUPERSEDED,
    GateVerdict.WAIT: StopReason.GATEWAY_UNREACHABLE,
}
"""Verdicts that stop a running attempt."""


class Attempt:
    """One attempt at one job. `run` never raises but for a cancellation from outside."""

    def __init__(self, backend: Backend, blobs: BlobStore, context: WorkerContext, outbox: Outbox, body: bytes) -> None:
        self._backend = backend
        self._blobs = blobs
        self._context = context
        self._outbox = outbox
        self.job = outbox.job
        self.envelope = outbox.envelope
        self._body = body
        self._is_private = self.envelope.sealed
        """Logs hold nothing that the caller or the server wrote."""
        outbox.input_bytes = len(body)
        self.began = self.last_output = self.last_heartbeat = self._phase_began = monotonic()
        self._last_report = 0.0
        self._loading = False
        self._alive = False
        """The backend has reported progress without output."""
        self._running = False
        """Between the start and the end of the backend's work, while the time limits hold."""
        self._confirm_at = inf
        """When the attempt first reports to the gateways that it runs."""
        self._grant: asyncio.Future[GateReply | None] | None = None
        """Receives the next reply, while the backend waits for it."""
        self._stop_reason: StopReason | None = None
        self._stopped_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._conclusion: Callable[[], Awaitable[str]] | None = None
        """Reports the end of an attempt that is not complete."""
        self.outcome = "running"
        self.error: ErrorInfo | None = None
        self.failure: BackendError | None = None
        """The error of the backend, where it failed."""
        self._trace: AttemptTrace | None = None
        """Records the attempt's spans; None: it is not traced."""
        if context.tracer is not None and (parent := self.envelope.trace) is not None:
            self._trace = AttemptTrace(context.tracer, parent, self.envelope, outbox.job, context.worker)

    def _log_fields(self) -> dict[str, Any]:
        env = self.envelope
        return {
            "request_id": env.request_id,
            "job": env.job,
            "run": env.run,
            "delivery": self.job.delivery,
            "model": env.model,
        }

    @cached_property
    def _log(self) -> Any:
        """Return the logger of this attempt, which costs too much to be made for each one."""
        return log.bind(**self._log_fields())

    async def run(self) -> None:
        """Run to the end."""
        self._task = asyncio.current_task()
        if self.envelope.hops:
            GATEWAY_HOPS.set(self.envelope.hops)
        try:
            try:
                if self._stop_reason is None and await self._start():
                    await self._work()
            except JobLost:
                self._stop_reason = StopReason.OWNERSHIP_LOST
            except asyncio.CancelledError:
                if self._stop_reason is None:
                    raise
            except Exception as error:
                self._handle_error(error)
            self._running = False
            if self._stop_reason is not None:
                self._end_stopped(self._stop_reason)
            if self._conclusion is not None:
                await self._conclude(self._conclusion)
        finally:
            self._outbox.close()

    @property
    def has_model_loaded(self) -> bool:
        """Whether the backend has begun to answer, so that its model is loaded."""
        return not self._loading and (self._outbox.tokens > 0 or self._alive)

    def stop(self, reason: StopReason) -> None:
        """End the backend call; the first reason counts."""
        if self._stop_reason is None and self.outcome == "running":
            self._stop_reason = reason
            self._stopped_at = monotonic()
            if self._task is not None:
                self._task.cancel()

    def enforce_limits(self, now: float) -> None:
        """Stop the attempt when a time limit is exceeded while the backend works, or whenever the job is another worker's."""
        limits = self.envelope.limits
        if self.outcome == "completed":
            if now - self.last_output > CLOSE_TIMEOUT_S and self._task is not None:
                self._task.cancel()
        elif self._stop_reason is not None:
            if now - self._stopped_at > CLOSE_TIMEOUT_S and self._task is not None:
                self._task.cancel()  # its backend does not end the call
        elif not self.job.owned:
            self.stop(StopReason.OWNERSHIP_LOST)
        elif not self._running:
            pass
        elif self._loading:
            if now - self._phase_began > limits.load_s:
                self.stop(StopReason.LOAD_TIMEOUT)
        elif now - self._phase_began > limits.total_s:
            self.stop(StopReason.TOTAL_TIMEOUT)
        elif not (self._outbox.tokens or self._alive):
            if now - self._phase_began > limits.first_token_s:
                self.stop(StopReason.FIRST_TOKEN_TIMEOUT)
        elif now - self.last_output > limits.idle_s:
            self.stop(StopReason.IDLE_TIMEOUT)
        if now >= self._confirm_at:
            self._confirm()

    # Requests to the gateways

    def send_heartbeat(self) -> None:
        """Extend the ownership of the job, and ask whether the attempt may go on."""
        self.job.extend()
        self._confirm()

    def _confirm(self) -> None:
        """Report to the gateways that the attempt runs, and ask whether it may go on. An attempt that has ended asks nothing."""
        self._confirm_at = inf
        if self._running and self._stop_reason is None:
            self._last_report = monotonic()
            self._outbox.request(FrameKind.HEARTBEAT, self._on_reply)

    def _on_reply(self, reply: GateReply | None) -> None:
        if self._grant is not None and not self._grant.done():
            self._grant.set_result(reply)
        elif reply is not None:
            if reply.kind in STOP_REASONS:
                self.stop(STOP_REASONS[reply.kind])
        elif self._outbox.needs_gateway:
            asyncio.get_running_loop().call_later(REQUEST_RETRY_S, self._confirm)

    async def _start(self) -> bool:
        """Return whether the backend may begin."""
        outbox, reply = self._outbox, None
        if outbox.starts_at_once:
            self._context.start_timer.add(self._confirm)
        else:
            reply, self._grant = await self._request_grant(), None
            if self.envelope.sealed and not self._take_key(reply):
                reply = GateReply(kind=GateVerdict.WAIT, delay_s=KEY_RETRY_S)
            if reply is None:
                self._log.warning("attempt.started_without_grant")
            elif reply.kind is not GateVerdict.PROCEED:
                self._follow(reply)
                return False
            self.began = self.last_output = self._phase_began = monotonic()
            self._confirm_at = self.began + outbox.report_interval_s
        self._running = True
        outbox.begin(reply)
        return True

    def _take_key(self, reply: GateReply | None) -> bool:
        """Return whether the attempt may be decided by `reply`: it refuses the start, or holds the key of a sealed job."""
        if reply is None or (reply.kind is GateVerdict.PROCEED and not reply.key):
            self._log.warning("attempt.key_missing", answered=reply is not None)
            return False
        if reply.key:
            self._outbox.key = ContentKey.parse(reply.key)
        return True

    async def _request_grant(self) -> GateReply | None:
        """Return the gateways' decision about the start; None: none replies, and the attempt starts all the same."""
        outbox = self._outbox
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(outbox.grant_timeout_s):
                for _ in range(MAX_REQUESTS):
                    grant: asyncio.Future[GateReply | None] = asyncio.get_running_loop().create_future()
                    self._grant = grant
                    outbox.request(FrameKind.STARTED, self._on_reply)
                    await asyncio.wait((grant,), timeout=outbox.resend_s)
                    if grant.done():
                        if (reply := grant.result()) is not None:
                            return reply
                        await asyncio.sleep(REQUEST_RETRY_S)
        return None

    def _follow(self, reply: GateReply) -> None:
        """End an attempt that must not start."""
        if reply.kind is GateVerdict.WAIT:
            self.job.nak(reply.delay_s)
            self.outcome = "returned"
        elif reply.kind is GateVerdict.EXHAUSTED:
            self._outbox.number = reply.attempt
            info = ErrorInfo.model_validate(reply.error) if reply.error else None
            self._fail(NexusError.from_info(info) if info else BackendFailed(code="worker_lost"), dead=True)
        else:
            self._stop_reason = STOP_REASONS[reply.kind]

    # The work

    async def _work(self) -> None:
        task = await self._read_task()
        run = self._backend.run(task) if self._trace is None else self._trace.run(self._backend, task)
        output = cast("AsyncGenerator[Output, None]", run)
        outbox = self._outbox
        try:
            async for piece in output:
                if isinstance(piece, Chunk):
                    outbox.tokens += piece.tokens
                    self._loading = False
                    self.last_output = monotonic()
                    if piece.data and outbox.take(piece.data):
                        await outbox.flush()
                        self.last_output = monotonic()
                elif isinstance(piece, Progress):
                    self._take_progress(piece)
                elif isinstance(piece, Adaptation):
                    outbox.adapted = piece.parameters
                    payload = AdaptedParameters(parameters=piece.parameters).model_dump_json().encode()
                    outbox.send_next(FrameKind.ADAPTED, payload)
                else:
                    self._running = False
                    self.outcome = await outbox.complete(piece)
                    self.last_output = monotonic()
                    break
            else:
                raise BackendError("the backend's answer ended before it was complete", transient=True)
        finally:
            await self._close_output(output)

    async def _read_task(self) -> Task:
        """Return the adapter's task. A body that travels by reference is read here, uploads when the adapter reads them."""
        if self._outbox.key is not None:
            self.envelope, self._body = open_request(self._outbox.key, self.envelope, self._body)
            self._outbox.input_bytes = len(self._body)
        env, body = self.envelope, self._body
        files: tuple[UploadedFile, ...] = ()
        if env.uploads:
            files, body = self._split_uploads(body)
        if env.body_blob is not None:
            body = b"".join([piece async for piece in self._blobs.read(env.body_blob)])
            self._outbox.input_bytes += len(body)
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
            self._store_file,
            self._context.adapts if not env.unsupported else env.unsupported == "adapt",
            self._push if env.stream and self._outbox.needs_gateway else None,
        )

    def _push(self, data: bytes, tokens: int) -> None:
        """Send output for an adapter that waits for its server; it is never so large that it must be flushed."""
        self._outbox.tokens += tokens
        self.last_output = monotonic()
        try:
            self._outbox.take(data)
        except JobLost:
            self.stop(StopReason.OWNERSHIP_LOST)

    def _split_uploads(self, body: bytes) -> tuple[tuple[UploadedFile, ...], bytes]:
        """Return the uploads, and `body` without those that travel inline."""
        files: list[UploadedFile] = []
        at = start = len(body) if self.envelope.body_size is None else self.envelope.body_size
        for upload in self.envelope.uploads:
            pieces: Callable[[], AsyncIterator[bytes]]
            if upload.blob is not None:
                pieces = partial(self._blobs.read, upload.blob)
                self._outbox.input_bytes += upload.size
            else:
                pieces = partial(_one_piece, body[at : at + upload.size])
                at += upload.size
            files.append(UploadedFile(upload.field, upload.filename, upload.content_type, upload.size, pieces))
        return tuple(files), body[:start]

    async def _store_file(self, data: bytes, content_type: str) -> str:
        env = self.envelope
        writer = self._blobs.writer(ttl_s=env.keep_s, content_type=content_type, owner=env.owner)
        try:
            await writer.write(data)
            return STORED_FILE_PREFIX + (await writer.close()).name
        except BaseException:
            await writer.abort()
            raise

    async def _close_output(self, output: AsyncGenerator[Output, None]) -> None:
        """Close the backend's output. The slot stays taken until the backend has really stopped, or CLOSE_TIMEOUT_S has passed."""
        if self.outcome == "completed":
            # `enforce_limits` bounds this: a timeout of its own would cost each job 4 µs.
            with contextlib.suppress(asyncio.CancelledError):
                await output.aclose()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._outbox.abort()
                await output.aclose()

    def _take_progress(self, progress: Progress) -> None:
        """Pass progress on. It counts as output, unless it only says that the model is being loaded or has been loaded."""
        now = monotonic()
        loading = progress.phase == LOADING_PHASE
        if self._loading is not loading:
            self._phase_began = now  # loading and the work after it have separate limits
            self._alive = False
        elif not loading:
            self._alive = True
        self._loading = loading
        self.last_output = now
        if progress.preview is not None and len(progress.preview) > MAX_PREVIEW:
            progress = progress.model_copy(update={"preview": None})
        self._outbox.send_next(FrameKind.PROGRESS, progress.model_dump_json(exclude_none=True).encode())
        self._outbox.progress = progress
        if now - self._last_report >= self._outbox.report_interval_s:
            self._confirm()

    # The end

    def _handle_error(self, error: Exception) -> None:
        wrapped, transient = self._wrap_error(error)
        counted, delay_s = self._counts_as_failure(wrapped), None
        if transient and not self._outbox.has_output:
            delay_s = self._outbox.retry_delay_s() if counted else UNCOUNTED_RETURN_S
        if delay_s is None:
            self._fail(wrapped, dead=transient)
        else:
            self._return_job(wrapped, delay_s, counted=counted)

    def _wrap_error(self, error: Exception) -> tuple[NexusError, bool]:
        """Note an error; return it as it travels, and whether another attempt may succeed."""
        wrapped = wrap_exception(error)
        if wrapped is not error:
            self._log.warning("attempt.unexpected_exception", exc_info=None if self._is_private else error)
        public = wrapped.info.redacted()
        if public is not wrapped.info:
            self._log.warning("attempt.error_hidden", error="" if self._is_private else wrapped.info.message)
            wrapped.info = public
        self.error = wrapped.info
        if isinstance(wrapped, BackendError):
            self.failure = wrapped
        return wrapped, wrapped.transient if isinstance(wrapped, BackendError) else isinstance(wrapped, Unavailable)

    def _counts_as_failure(self, error: NexusError) -> bool:
        """Return whether the attempt counts as a failed one: not where the server asked to wait, or got no request."""
        if not isinstance(error, BackendUnavailable) or self._outbox.tokens or self._alive:
            return True
        return error.pause_s is None and not error.unsent

    def _end_stopped(self, reason: StopReason) -> None:
        limits = self.envelope.limits
        if reason in FENCED_REASONS:
            self.outcome = "fenced"
        elif reason in ABANDONED_REASONS:
            self.job.ack()
            self.outcome = "cancelled"
        elif reason is StopReason.GATEWAY_UNREACHABLE:
            self.job.nak(REQUEST_RETRY_S)
            self.outcome = "returned"
        elif reason is StopReason.DRAINED:
            error = Unavailable("the worker was shut down; the job goes to another one", code=WORKER_DRAINED)
            self._return_job(error, 0.0, counted=True)
        elif reason is StopReason.FIRST_TOKEN_TIMEOUT:
            self._fail_late(f"the backend sent nothing within {limits.first_token_s:g} s (first-token limit)")
        elif reason is StopReason.IDLE_TIMEOUT:
            self._fail_late(f"the backend fell silent for {limits.idle_s:g} s (idle limit)")
        elif reason is StopReason.LOAD_TIMEOUT:
            self._fail_late(f"the backend did not load the model within {limits.load_s:g} s (load limit)")
        else:
            self._fail_late(f"the answer was not complete after {limits.total_s:g} s (total limit)")

    def _fail_late(self, message: str) -> None:
        self._fail(DeadlineExceeded(message), dead=False)

    def _fail(self, error: NexusError, *, dead: bool) -> None:
        """End the job with an error. `dead`: another attempt might have succeeded."""
        self.error = error.info
        self._conclusion = partial(self._outbox.fail, error, dead=dead)

    def _return_job(self, error: NexusError, delay_s: float, *, counted: bool) -> None:
        """Return the job to its queue. `counted`: the attempt counts as a failed one."""
        self.error = error.info
        self._conclusion = partial(self._outbox.return_job, error, delay_s, counted=counted)

    async def _conclude(self, conclusion: Callable[[], Awaitable[str]]) -> None:
        """Report the end of the attempt, and settle the job. The job's ownership bounds this."""
        try:
            self.outcome = await conclusion()
        except JobLost:
            self.outcome = "fenced"
        except asyncio.CancelledError:
            # `stop` was called meanwhile: the job has its outcome, or is another worker's.
            if self._stop_reason is None:
                raise
            if self._stop_reason in ABANDONED_REASONS:
                self.job.ack()
            self.outcome = "fenced"

    def log_end(self, ended: float) -> None:
        """Write the attempt's log line."""
        seconds = round(ended - self.began, 4)
        fields = {"outcome": self.outcome, "seconds": seconds, "tokens": self._outbox.tokens}
        reason = self._stop_reason.value if self._stop_reason is not None else ""
        if reason:
            fields["stop_reason"] = reason
        if self._trace is not None:
            fields["trace_id"] = self._trace.trace_id
            code = (self.error.code or self.error.type) if self.error is not None else ""
            self._trace.end(ended, self.outcome, reason, code)
        if self.error is not None:
            message = "" if self._is_private else self.error.message
            self._log.warning("attempt.finished", error=message, code=self.error.code, **fields)
        else:
            log_info("attempt.finished", {**self._log_fields(), **fields})


async def _one_piece(data: bytes) -> AsyncIterator[bytes]:
    yield data
