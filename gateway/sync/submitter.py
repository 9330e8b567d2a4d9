"""Submit synchronous requests to the bus, and enforce the deadlines of those that are open."""

from __future__ import annotations

import asyncio
import contextlib
from functools import lru_cache
from time import monotonic
from typing import Literal

from backbone.bus.bus import Queue
from backbone.bus.content_seals import ContentKey, seal_request
from backbone.ids import new_job_id
from backbone.tracing.spans import Span
from gateway.dispatcher import Dispatcher
from gateway.http.inference_body import ReceivedRequest
from gateway.http.unread_budget import UnreadBudget
from gateway.sync.request_state import RequestState, SyncRequest
from gateway.traces import RequestTrace
from schemas.errors import NexusError, Unavailable
from schemas.jobs import Capability, Envelope, EnvelopeTemplate, Lane, with_trace

CHECK_INTERVAL_S = 0.25
MAX_TEMPLATES = 1024
NO_WORKER_TIMEOUT_S = 30.0
"""A queued request waits this long for a worker of its model to return after the last one has left."""


class SyncSubmitter:
    """Submits synchronous requests, and ends those that no worker will serve in time."""

    def __init__(
        self, dispatcher: Dispatcher, ack_wait_s: float, *, keep_s: float = 3600.0, unread: UnreadBudget | None = None
    ) -> None:
        """Begin without requests. `keep_s`: how long results that travel by reference are stored."""
        self._dispatcher = dispatcher
        self._bus = dispatcher.bus
        self.catalog = dispatcher.catalog
        self._ack_wait_s = ack_wait_s
        self._keep_s = keep_s
        self._unread = unread
        self._requests: set[SyncRequest] = set()
        self._task: asyncio.Task[None] | None = None
        self._template = lru_cache(maxsize=MAX_TEMPLATES)(self._make_template)

    async def start(self) -> None:
        """Start to enforce deadlines. The dispatcher has started."""
        self._task = asyncio.create_task(self._enforce_deadlines())

    async def close(self) -> None:
        """End all open requests, and stop."""
        self.end_requests()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def end_requests(self) -> None:
        """End every open request with the error that the gateway shuts down."""
        for request in list(self._requests):
            request.fail(Unavailable("The gateway is shutting down. Send the request again.", should_retry=True))

    def submit(
        self,
        *,
        request_id: str,
        endpoint: str,
        capability: Capability,
        lane: Lane,
        public_model: str,
        stream: bool,
        owner: str,
        received: ReceivedRequest,
        hops: int = 0,
        sealed: bool = False,
        span: Span | None = None,
    ) -> SyncRequest:
        """Submit a request. `sealed`: what is stored of it cannot be read once it has ended. `span`: the span below which its trace goes on. QueueFull is reported later, on the returned request.

        Raises ModelNotFound, InvalidRequest, Unavailable, RequestTooLarge.
        """
        dispatcher = self._dispatcher
        model = dispatcher.resolve_live(public_model, capability)
        limits = dispatcher.limits_of(capability)
        dispatcher.require_unpaused(model, limits.queue_s, monotonic())
        policy = self.catalog.unsupported(public_model)
        template = self._template(endpoint, capability, lane, model, public_model, owner, policy, stream=stream)
        envelope, line = template.fill(new_job_id(), request_id, self._bus.new_reply_subject())
        if hops or received.body_blob or received.uploads:
            own = {"hops": hops, "body_blob": received.body_blob, "body_size": received.body_size}
            envelope, line = envelope.model_copy(update=own | {"uploads": received.uploads}), b""
        if span is not None:
            envelope, line = with_trace(envelope, line, span.context)
        body = received.body
        if sealed:
            key, line = ContentKey.new(), b""
            envelope, body = seal_request(key, envelope, body)
        request = SyncRequest(self._bus, envelope, self._ack_wait_s, self._unread)
        if sealed:
            request.content_key = str(key)
        if span is not None:
            request.trace = RequestTrace()
        self._bus.submit(envelope, body, request, line)
        self._requests.add(request)
        return request

    def _make_template(
        self,
        endpoint: str,
        capability: Capability,
        lane: Lane,
        model: str,
        public_model: str,
        owner: str,
        policy: Literal["", "refuse", "adapt"],
        *,
        stream: bool,
    ) -> EnvelopeTemplate:
        """Return the template of requests that differ in their ids only: each envelope made by itself takes longer."""
        envelope = Envelope(
            job="-",
            reply="-",
            endpoint=endpoint,
            capability=capability,
            lane=lane,
            model=model,
            public_model=public_model,
            stream=stream,
            owner=owner,
            limits=self._dispatcher.limits_of(capability),
            keep_s=self._keep_s,
            unsupported=policy,
        )
        return EnvelopeTemplate(envelope)

    def finish(self, request: SyncRequest) -> None:
        """Forget a request that its HTTP handler has done with; abandon it if it has not ended."""
        request.abandon()
        request.direct_writer = None
        self._requests.discard(request)

    async def position(self, request: SyncRequest) -> int:
        """Return how many waiting jobs start before this one. Raises Unavailable."""
        if request.seq is None:
            return 0
        return await self._bus.queue_position(request.queue, request.seq) or 0

    async def _enforce_deadlines(self) -> None:
        is_live = self._dispatcher.is_live
        orphaned: dict[Queue, float] = {}
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            now = monotonic()
            for request in list(self._requests):
                request.check_deadlines(now)
                if request.state is RequestState.QUEUED:
                    if is_live(request.queue):
                        self._check_paused(request, now)
                    else:
                        _check_orphaned(request, orphaned.setdefault(request.queue, now), now)
            orphaned = {queue: since for queue, since in orphaned.items() if not is_live(queue)}

    def _check_paused(self, request: SyncRequest, now: float) -> None:
        """End a request whose model's servers pause for longer than it may wait."""
        left_s = request.queued_at + request.envelope.limits.queue_s - now
        try:
            self._dispatcher.require_unpaused(request.queue.model, left_s, now)
        except Unavailable as error:
            request.fail(error)


def _check_orphaned(request: SyncRequest, since: float, now: float) -> None:
    """End a queued request whose model has had no live worker since `since`; a worker that restarts gets the time to."""
    if request.return_error is not None:
        # The backend failed, and by now no worker's backend is well: no worker would take the job for long.
        request.fail(NexusError.from_info(request.return_error))
    elif now - since > NO_WORKER_TIMEOUT_S:
        request.fail(
            Unavailable(
                f"The model '{request.queue.model}' has had no live worker for {NO_WORKER_TIMEOUT_S:g} s. Retry later."
            )
        )
