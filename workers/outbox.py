"""Where the output of one attempt goes: `ReplyOutbox` sends it to the gateway that waits, `EventOutbox` stores it.

`Attempt` decides what an attempt does; an outbox knows how its kind of job sends it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobStore, BlobWriter
from backbone.bus.bus import JobDelivery
from backbone.bus.content_seals import ContentKey
from schemas.errors import ErrorInfo, NexusError
from schemas.frames import AttemptReturned, BlobRef, FrameKind, Progress
from schemas.job_events import GateReply
from schemas.jobs import Envelope
from workers.backends.base import Finish

MAX_FRAME_BYTES = 256 * 1024
"""Payload bytes of one event; larger output travels in several."""
REQUEST_RETRY_S = 0.25
"""The pause before the worker repeats a request that a gateway did not receive."""
MAX_REQUESTS = 10
"""A gateway that does not receive this many requests is dead; after fewer, it may only be reconnecting."""
MAX_TRANSIENT_FAILURES = 3
"""Counted attempts after which a transient backend error is final; for a direct job, its gateway counts them."""

OnReply = Callable[[GateReply | None], None]
"""Receives the reply to a request; None: no gateway has received the request, and one may do so later."""


class JobLost(Exception):
    """The job belongs to another worker by now."""


class Outbox(ABC):
    """Sends or stores the output and the end of one attempt, and asks the gateways whether the attempt may go on.

    Methods that send raise JobLost once the job belongs to another worker.
    """

    needs_gateway: ClassVar[bool]
    """The caller waits at one gateway: a request that it did not receive is repeated."""
    grant_timeout_s: ClassVar[float]
    """Without any reply, an attempt starts after this time."""
    resend_s: ClassVar[float]
    """The request for the start grant is sent again after this time without a reply."""
    report_interval_s: ClassVar[float]
    """The gateways receive progress at most at this interval, and a first heartbeat so soon after the start."""
    starts_at_once: bool = False
    """The attempt starts without waiting for a start grant."""

    def __init__(self, blobs: BlobStore, job: JobDelivery, envelope: Envelope, token: str) -> None:
        self._blobs = blobs
        self.job = job
        self.envelope = envelope
        self._token = token
        self._seq = 0
        self.key: ContentKey | None = None
        """Encrypts what is stored of a sealed job's answer; None: the job is not sealed."""
        self.number = 1
        """The number of this attempt within its run, where a gateway has told it."""
        self.input_bytes = 0
        """Bytes of the request's body and files, once they have been read."""
        self.tokens = 0
        self.adapted: tuple[str, ...] = ()
        """Parameters of the request that were replaced by their nearest equivalent."""
        self.progress: Progress | None = None
        self.has_output = False
        """Output has been sent to the caller: another attempt could not take it back."""
        self._buffered: list[bytes] = []
        """The output that is not sent yet, as long as it is small."""
        self._buffered_size = 0
        self._writer: BlobWriter | None = None
        """Takes the output that is too large to be buffered."""

    @abstractmethod
    def request(self, kind: FrameKind, on_reply: OnReply) -> None:
        """Ask for the start grant (STARTED), or whether the attempt is still valid (HEARTBEAT)."""

    @abstractmethod
    def begin(self, reply: GateReply | None) -> None:
        """Report the start of the attempt. `reply`: the start grant; None: no gateway has replied, or none was asked."""

    @abstractmethod
    def send(self, kind: FrameKind, seq: int, payload: bytes) -> None:
        """Send one event."""

    def send_next(self, kind: FrameKind, payload: bytes) -> None:
        """Send the next event."""
        self._seq += 1
        self.send(kind, self._seq, payload)

    @abstractmethod
    def take(self, data: bytes) -> bool:
        """Send output, or buffer it. Return True when `flush` must follow."""

    @abstractmethod
    async def flush(self) -> None:
        """Move buffered output to a blob, or wait until events are stored."""

    @abstractmethod
    async def complete(self, finish: Finish) -> str:
        """Report the complete answer, and acknowledge the job. Return the outcome."""

    @abstractmethod
    def retry_delay_s(self) -> float | None:
        """Return the pause before the next attempt after a transient failure; None: this attempt was the last one."""

    @abstractmethod
    async def fail(self, error: NexusError, *, dead: bool) -> str:
        """End the job with an error. `dead`: another attempt might have succeeded. Return the outcome."""

    @abstractmethod
    async def return_job(self, error: NexusError, delay_s: float, *, counted: bool) -> str:
        """Return the job to its queue. `counted`: the attempt counts as failed. Return the outcome."""

    @abstractmethod
    def close(self) -> None:
        """Drop what is not sent, and the requests without a reply."""

    async def abort(self) -> None:
        """Drop the output that has begun to move to a blob."""
        if self._writer is not None:
            await self._writer.abort()

    @property
    def _overflows(self) -> bool:
        return self._buffered_size > INLINE_LIMIT_BYTES or self._writer is not None

    async def _move_to_blob(self, ttl_s: float, content_type: str = "application/octet-stream") -> None:
        if self._writer is None:
            self._writer = self._blobs.writer(ttl_s=ttl_s, content_type=content_type, owner=self.envelope.owner)
        buffered, self._buffered = self._buffered, []
        for data in buffered:
            await self._writer.write(data)

    async def _close_writer(self) -> BlobRef | None:
        """Return the reference to the output in a blob; None where all of it is buffered."""
        if self._writer is None:
            return None
        info = await self._writer.close()
        self._writer = None
        return BlobRef(name=info.name, size=info.size)


def returned_payload(error: NexusError, *, counted: bool) -> bytes:
    """Return the payload of RETURNED."""
    info: ErrorInfo = error.info if counted else AttemptReturned(**error.info.model_dump(), counted=False)
    return info.model_dump_json(exclude_none=True).encode()
