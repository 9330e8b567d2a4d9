"""The worker's side of durable jobs on NATS, over a connection of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from backbone.bus.nats import outcomes
from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.event_writer import NatsEventWriter
from backbone.bus.nats.requests import ReplyFuture, RequestInbox
from backbone.bus.subjects import GATE_REQUESTS, require_token
from schemas.errors import Unavailable
from schemas.frames import FrameKind
from schemas.job_events import GateReply, GateRequest, decode_reply
from schemas.outcome import Outcome

REPLY_TIMEOUT_S = 5.0
SWEEP_INTERVAL_S = 0.25


class NatsWorkerLog:
    """Durable jobs as a worker stores them; see backbone.bus.job_log.WorkerLog."""

    def __init__(self, server: NatsAccess | str, name: str) -> None:
        self._connection = NatsConnection(
            server, f"{name}-log", on_reconnect=self._reconnected, resend_on_reconnect=False
        )
        self._inbox = RequestInbox(self._connection)
        self._writers: dict[bytes, _Writer] = {}
        self._next = 0
        self._prefix = f"{self._connection.new_inbox()}."
        self._sweep_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect, and subscribe to the confirmations of events."""
        await self._connection.connect()
        await self._inbox.start()
        await self._connection.subscribe(f"{self._prefix}>", self._on_confirmed)
        self._sweep_task = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Send the unsent data, and disconnect."""
        if self._sweep_task is not None:
            self._sweep_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweep_task
        await self._connection.close()
        self._inbox.close()
        for writer in list(self._writers.values()):
            writer.close()

    async def _reconnected(self) -> None:
        self._inbox.forget_lost()
        for writer in list(self._writers.values()):
            writer.resend()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            now = time.monotonic()
            for writer in list(self._writers.values()):
                writer.sweep(now)

    # Events

    def event_writer(self, job: str) -> NatsEventWriter:
        """Return a new writer; close it."""
        self._next += 1
        token = b"%d" % self._next
        writer = _Writer(self._connection, job, self._prefix.encode() + token, lambda: self._writers.pop(token, None))
        self._writers[token] = writer
        return writer

    def _on_confirmed(self, subject: bytes, _reply: bytes, _headers: bytes, data: bytes) -> None:
        token, round_, index = subject[len(self._prefix) :].split(b".")
        writer = self._writers.get(token)
        if writer is not None:
            writer.confirmed(int(round_), int(index), data)

    # Gate requests

    def request_gate(self, request: GateRequest, on_answer: Callable[[GateReply | None], None]) -> None:
        """Send one message to the queue group of the gateways."""
        subject = f"{GATE_REQUESTS}.{require_token(request.job)}".encode()
        payload = request.model_dump_json(exclude_defaults=True).encode()
        try:
            if request.kind is FrameKind.RETURNED:
                self._connection.publish(subject, payload)
                return
            reply = self._inbox.request(subject, payload)
        except Unavailable:
            if request.kind is not FrameKind.RETURNED:
                asyncio.get_running_loop().call_soon(on_answer, None)
            return
        timer = asyncio.get_running_loop().call_later(REPLY_TIMEOUT_S, reply.cancel)

        def answered(reply: ReplyFuture) -> None:
            timer.cancel()
            on_answer(_answer(reply))

        reply.add_done_callback(answered)

    # Outcomes and dead letters

    async def store_outcome(self, outcome: Outcome, payload: bytes) -> bool:
        return await outcomes.store_outcome(self._inbox, outcome, payload, self._connection.client.max_payload)

    async def store_dead_letter(self, outcome: Outcome, message: bytes) -> None:
        await outcomes.store_dead_letter(self._inbox, outcome, message, self._connection.client.max_payload)


class _Writer(NatsEventWriter):
    """A writer that its log forgets when it is closed."""

    def __init__(self, connection: NatsConnection, job: str, address: bytes, on_close: Callable[[], object]) -> None:
        super().__init__(connection, job, address)
        self._on_close = on_close

    def close(self) -> None:
        """Close the writer, and remove it from the log."""
        super().close()
        self._on_close()


def _answer(reply: ReplyFuture) -> GateReply | None:
    answers = None if reply.cancelled() else reply.result()
    return decode_reply(answers[0].data) if answers and not answers[0].has_no_responders else None
