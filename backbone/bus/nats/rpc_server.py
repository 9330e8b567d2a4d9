"""Answers the workers' gate requests, in turn with the other gateways."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable

import structlog

from backbone.bus.nats.connection import NatsConnection
from backbone.bus.subjects import GATE_REQUESTS, GATEWAY_GROUP, is_reply_subject
from schemas.errors import Unavailable
from schemas.job_events import GateReply, GateRequest

log = structlog.get_logger(__name__)

MAX_CONCURRENT_REQUESTS = 256
SHUTDOWN_TIMEOUT_S = 1.0
"""For replies that are being made when a gateway shuts down."""
MAX_QUEUED_REQUESTS = 10_000
"""Further requests are dropped: workers repeat them."""

GateRequestHandler = Callable[[GateRequest], Awaitable[GateReply | None]]


class RpcServer:
    """The gate requests that this gateway received."""

    def __init__(self, connection: NatsConnection, handler: GateRequestHandler) -> None:
        self._connection = connection
        self._handler = handler
        self._running: set[asyncio.Task[None]] = set()
        self._waiting: deque[tuple[GateRequest, bytes]] = deque(maxlen=MAX_QUEUED_REQUESTS)
        self._sid: int | None = None

    async def start(self) -> None:
        """Answer requests from now on, or from the next connection on. Raises Unavailable after `NatsConnection.close`."""
        self._sid = await self._connection.subscribe(f"{GATE_REQUESTS}.*", self._on_request, group=GATEWAY_GROUP)
        with contextlib.suppress(Unavailable):
            await self._connection.ping()

    async def close(self) -> None:
        """Accept no more requests, and answer the pending ones: a worker without a reply repeats its request only after
        seconds.
        """
        if self._sid is not None:
            sid, self._sid = self._sid, None
            await self._connection.unsubscribe(sid)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
                while self._running:
                    await asyncio.wait(self._running)
        self._waiting.clear()
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _on_request(self, _subject: bytes, reply: bytes, _headers: bytes, data: bytes) -> None:
        try:
            request = GateRequest.model_validate_json(data)
        except ValueError as error:
            self._connection.refusals.add("question", error=str(error))
            return
        if reply and not is_reply_subject(reply):
            self._connection.refusals.add("address", address=repr(reply[:100]), worker=request.worker)
            return
        self._waiting.append((request, reply))
        self._start_tasks()

    def _start_tasks(self) -> None:
        while self._waiting and len(self._running) < MAX_CONCURRENT_REQUESTS:
            task = asyncio.create_task(self._answer(*self._waiting.popleft()))
            self._running.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("gate.request_failed", exc_info=error)
        self._start_tasks()

    async def _answer(self, request: GateRequest, reply: bytes) -> None:
        answer = await self._handler(request)
        if answer is not None and reply:
            with contextlib.suppress(Unavailable):
                self._connection.publish(reply, answer.model_dump_json(exclude_defaults=True).encode())
