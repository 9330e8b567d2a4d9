"""What the attempts at direct and durable jobs have in common: they run the backend under time limits, and end in one outcome.

`SyncAttempt` answers one waiting gateway; `DurableAttempt` stores events and an outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, partial
from time import monotonic
from typing import Any, cast

import structlog

from backbone.bus.blobs import BlobStore, BlobWriter
from backbone.bus.bus import JobDelivery, WorkerBus
from backbone.ids import new_token
from backbone.logging import log_info
from schemas.errors import WORKER_DRAINED, DeadlineExceeded, ErrorInfo, NexusError, Unavailable
from schemas.frames import (
    LOADING_PHASE,
    MAX_PREVIEW,
    AdaptedParameters,
    AttemptReturned,
    AttemptStarted,
    BlobRef,
    FrameKind,
    Progress,
)
from schemas.jobs import Envelope
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
from workers.start_timer import StartTimer

log = structlog.get_logger(__name__)

MAX_FRAME_BYTES = 256 * 1024
"""Payload bytes of one event; larger output travels in several."""
REQUEST_RETRY_S = 0.25
"""The pause before the worker repeats a request that a gateway did not answer."""
MAX_REQUESTS = 10
"""A gateway that does not receive this many requests is dead; after fewer, it may only be reconnecting."""
STORED_FILE_PREFIX = "nexus-blob:"
"""Precedes the name of a blob that the caller gets by URL; the gateway recognizes it."""
MAX_TRANSIENT_FAILURES = 3
"""Counted attempts after which a transient backend error is final; for a direct job, its gateway counts them."""
UNCOUNTED_RETURN_S = 0.05
"""The pause before another worker gets a job that this worker's server has not begun."""
TOKEN_PREFIX_LENGTH = 10
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


def make_tokens() -> Iterator[str]:
    """Yield names for attempts that no other process yields. They are no secret, as a synchronous job's reply subject is."""
    prefix = new_token()[:TOKEN_PREFIX_LENGTH]
    return (f"{prefix}{number:x}" for number in itertools.count())


@dataclass(frozen=True)
class WorkerContext:
    """The worker that runs the attempts."""

    worker: str
    backend: str
    gateways: GatewayHealth = field(default_factory=GatewayHealth, compare=False)
    adapts: bool = True
    """Parameters that the server lacks are replaced by the nearest equivalent, unless the job's alias decides; False: refused."""

    tokens: Iterator[str] = field(default_factory=make_tokens, compare=False)
    """The names of this worker's attempts at synchronous jobs."""
    start_timer: StartTimer = field(default_factory=StartTimer, compare=False)

    @cached_property
    def started(self) -> bytes:
        """The payload of STARTED."""
        return AttemptStarted(worker=self.worker, backend=self.backend).model_dump_json().encode()


class Attempt(ABC):
    """One attempt at one job. `run` never raises but for a cancellation from outside."""

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
        self._bus = bus
        self._blobs = blobs
        self._backend = backend
        self._context = context
        self.job = job
        self.envelope = envelope
        self._body = body
        self._loop = asyncio.get_running_loop()
        self.began = self.last_output = self.last_heartbeat = self._phase_began = monotonic()
        self._seq = 0
        self._tokens = 0
        self._has_output = False
        """Output has been sent to the caller: another attempt could not take it back."""
        self._buffered: list[bytes] = []
        """The output that is not sent yet, as long as it is small."""
        self._buffered_size = 0
        self._writer: BlobWriter | None = None
        """Takes the output that is too large to be buffered."""
        self._loading = False
        self._alive = False
        """The backend has reported progress without output."""
        self._stop_reason: StopReason | None = None
        self._stopped_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self.outcome = "running"
        self.adapted: tuple[str, ...] = ()
        """Parameters of the request that were replaced by their nearest equivalent."""
        self.error: ErrorInfo | None = None
        self.failure: BackendError | None = None
        """The error of the backend, where it failed."""

    @cached_property
    def _log(self) -> Any:
        """Return the logger of this attempt, which costs too much to be made for each one."""
        return log.bind(**self._log_fields())

    def _log_fields(self) -> dict[str, Any]:
        env = self.envelope
        return {
            "request_id": env.request_id,
            "job": env.job,
            "run": env.run,
            "delivery": self.job.delivery,
            "model": env.model,
        }

    @abstractmethod
    async def run(self) -> None:
        """Run to the end."""

    @abstractmethod
    def send_heartbeat(self) -> None:
        """Extend the ownership of the job, and ask whether the attempt may go on."""

    @property
    def has_model_loaded(self) -> bool:
        """Whether the backend has begun to answer, so that its model is loaded."""
        return not self._loading and (self._tokens > 0 or self._alive)

    def stop(self, reason: StopReason) -> None:
        """End the backend call; the first reason counts."""
        if self._stop_reason is None and self.outcome == "running":
            self._stop_reason = reason
            self._stopped_at = monotonic()
            if self._task is not None:
                self._task.cancel()

    def enforce_limits(self, now: float) -> None:
        """Stop the attempt when a time limit is exceeded, or the job belongs to another worker."""
        limits = self.envelope.limits
        if self.outcome == "completed":
            if now - self.last_output > CLOSE_TIMEOUT_S and self._task is not None:
                self._task.cancel()
        elif self._stop_reason is not None:
            if now - self._stopped_at > CLOSE_TIMEOUT_S and self._task is not None:
                self._task.cancel()  # its backend does not end the call
        elif not self.job.owned:
            self.stop(StopReason.OWNERSHIP_LOST)
        elif self._loading:
            if now - self._phase_began > limits.load_s:
                self.stop(StopReason.LOAD_TIMEOUT)
        elif now - self._phase_began > limits.total_s:
            self.stop(StopReason.TOTAL_TIMEOUT)
        elif not (self._tokens or self._alive):
            if now - self._phase_began > limits.first_token_s:
                self.stop(StopReason.FIRST_TOKEN_TIMEOUT)
        elif now - self.last_output > limits.idle_s:
            self.stop(StopReason.IDLE_TIMEOUT)

    # The work

    async def _work(self) -> None:
        output = cast("AsyncGenerator[Output, None]", self._backend.run(await self._read_task()))
        try:
            async for piece in output:
                if isinstance(piece, Chunk):
                    if self._take_chunk(piece):
                        await self._flush_output()
                elif isinstance(piece, Progress):
                    self._take_progress(piece)
                elif isinstance(piece, Adaptation):
                    self._take_adaptation(piece)
                else:
                    await self._complete(piece)
                    break
            else:
                raise BackendError("the backend's answer ended before it was complete", transient=True)
        finally:
            await self._close_output(output)

    async def _read_task(self) -> Task:
        """Return the adapter's task. A body that travels by reference is read here, uploads when the adapter reads them."""
        env, body = self.envelope, self._body
        files: tuple[UploadedFile, ...] = ()
        if env.uploads:
            files, body = self._split_uploads(body)
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
            self._store_file,
            self._context.adapts if not env.unsupported else env.unsupported == "adapt",
        )

    def _split_uploads(self, body: bytes) -> tuple[tuple[UploadedFile, ...], bytes]:
        """Return the uploads, and `body` without those that travel inline."""
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
                if self._writer is not None:
                    await self._writer.abort()
                await output.aclose()

    @abstractmethod
    def _take_chunk(self, chunk: Chunk) -> bool:
        """Send output, or buffer it. Return True when `_flush_output` must follow."""

    @abstractmethod
    async def _flush_output(self) -> None:
        """Move buffered output to a blob, or wait until events are stored."""

    @abstractmethod
    async def _complete(self, finish: Finish) -> None:
        """Report the complete answer, and acknowledge the job."""

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
        self._send_next(FrameKind.PROGRESS, progress.model_dump_json(exclude_none=True).encode())

    def _take_adaptation(self, adaptation: Adaptation) -> None:
        """Report which parameters were replaced."""
        self.adapted = adaptation.parameters
        payload = AdaptedParameters(parameters=adaptation.parameters).model_dump_json().encode()
        self._send_next(FrameKind.ADAPTED, payload)

    async def _close_writer(self) -> BlobRef:
        assert self._writer is not None
        info = await self._writer.close()
        self._writer = None
        return BlobRef(name=info.name, size=info.size)

    def _send_next(self, kind: FrameKind, payload: bytes) -> None:
        self._seq += 1
        self._send(kind, self._seq, payload)

    @abstractmethod
    def _send(self, kind: FrameKind, seq: int, payload: bytes = b"") -> None:
        """Send an event, as long as the job belongs to this worker."""

    # The end

    @abstractmethod
    def _end(self, error: NexusError) -> None:
        """End the job with a permanent error."""

    @abstractmethod
    def _return_job(self, error: NexusError, delay_s: float, *, counted: bool = True) -> None:
        """Return the job to its queue. `counted`: the attempt counts as a failed one."""

    def _wrap_error(self, error: Exception) -> tuple[NexusError, bool]:
        """Note an error; return it as it travels, and whether another attempt may succeed."""
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

    def _counts_as_failure(self, error: NexusError) -> bool:
        """Return whether the attempt counts as a failed one: not where the server asked to wait, or got no request."""
        if not isinstance(error, BackendUnavailable) or self._tokens or self._alive:
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
            self._return_job(
                Unavailable("the worker was shut down; the job goes to another one", code=WORKER_DRAINED), 0.0
            )
        elif reason is StopReason.FIRST_TOKEN_TIMEOUT:
            self._end(
                DeadlineExceeded(f"the backend sent nothing within {limits.first_token_s:g} s (first-token limit)")
            )
        elif reason is StopReason.IDLE_TIMEOUT:
            self._end(DeadlineExceeded(f"the backend fell silent for {limits.idle_s:g} s (idle limit)"))
        elif reason is StopReason.LOAD_TIMEOUT:
            self._end(DeadlineExceeded(f"the backend did not load the model within {limits.load_s:g} s (load limit)"))
        else:
            self._end(DeadlineExceeded(f"the answer was not complete after {limits.total_s:g} s (total limit)"))

    def log_end(self, ended: float) -> None:
        """Write the attempt's log line."""
        seconds = round(ended - self.began, 4)
        fields = {"outcome": self.outcome, "seconds": seconds, "tokens": self._tokens}
        if self._stop_reason is not None:
            fields["stop_reason"] = self._stop_reason.value
        if self.error is not None:
            self._log.warning("attempt.finished", error=self.error.message, code=self.error.code, **fields)
        else:
            log_info("attempt.finished", {**self._log_fields(), **fields})


def returned_payload(error: NexusError, *, counted: bool) -> bytes:
    """Return the payload of RETURNED."""
    info = error.info if counted else AttemptReturned(**error.info.model_dump(), counted=False)
    return info.model_dump_json(exclude_none=True).encode()


async def _one_piece(data: bytes) -> AsyncIterator[bytes]:
    yield data
