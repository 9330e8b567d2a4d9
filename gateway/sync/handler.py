"""The hot path: one inference request, from its headers to its last byte, as a bare ASGI application.

FastAPI's routing, dependencies and response classes cost 89 µs a request; this costs what it does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import structlog

from backbone.bus.blobs import BlobStore
from gateway.auth.authenticator import Authenticator, ConcurrencyLimiter, Principal
from gateway.dispatcher import Dispatcher
from gateway.endpoints import (
    DONE,
    LANE_OF_TIER,
    SSE,
    Endpoint,
    adapted_frame,
    comment_frame,
    error_frame,
    progress_frame,
)
from gateway.http.asgi import (
    EXCHANGE,
    HOPS,
    NO_STORE,
    STREAM_HEADERS,
    HttpExchange,
    Receive,
    Reply,
    Scope,
    Send,
    adapted_header,
    request_id_of,
    to_error_info,
    watch_disconnect,
)
from gateway.http.inference_body import InferenceBodyReader, ReceivedRequest
from gateway.http.preferences import read_preferences
from gateway.http.request_body import CallerDisconnected
from gateway.jobs.http_handler import DurableRequest, DurableRequestHandler
from gateway.metrics import GatewayMetrics
from gateway.signed_urls import UrlSigner, base_url
from gateway.sync.request_state import RequestState, SyncRequest
from schemas.errors import ErrorInfo, NexusError
from schemas.frames import AttemptDone, BlobRef
from schemas.jobs import Lane

log = structlog.get_logger(__name__)

COMMENT_EVERY_S = 10.0
CLOSED = 499
"""In logs and metrics: the caller hung up."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request may take."""

    comment_after_s: float
    log_prompts: bool = False


class InferenceHandler:
    """Serves the endpoints whose requests become jobs."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        reader: InferenceBodyReader,
        blobs: BlobStore,
        url_signer: UrlSigner,
        auth: Authenticator,
        metrics: GatewayMetrics,
        bounds: Bounds,
        durable_handler: DurableRequestHandler,
    ) -> None:
        self._dispatcher = dispatcher
        self._reader = reader
        self._blobs = blobs
        self._url_signer = url_signer
        self._auth = auth
        self._metrics = metrics
        self._bounds = bounds
        self._durable_handler = durable_handler
        self._open = ConcurrencyLimiter()

    async def serve(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Never raises, but for cancellation."""
        request = _Request(self, endpoint, Reply(send, request_id_of(scope)), scope.get(EXCHANGE))
        metrics = self._metrics
        metrics.in_flight.inc()
        try:
            await request.answer(scope, receive)
        finally:
            metrics.in_flight.dec()
            # After the loop's turn that writes the answer: nobody waits for our bookkeeping.
            asyncio.get_running_loop().call_soon(request.report, monotonic())


class _Request:
    """One request's state."""

    __slots__ = (
        "_began", "_by_url", "_call", "_counted", "_endpoint", "_error", "_exchange", "_received", "_reply", "_side", "_status",
        "_type",
    )  # fmt: skip

    def __init__(self, side: InferenceHandler, endpoint: Endpoint, reply: Reply, exchange: HttpExchange | None) -> None:
        self._side = side
        self._endpoint = endpoint
        self._reply = reply
        self._exchange = exchange
        self._began = monotonic()
        self._call: SyncRequest | None = None
        self._received: ReceivedRequest | None = None
        self._type: bytes | None = None
        """Of an answer that is passed on as it is made."""
        self._by_url: str | None = None
        """Where results are to be fetched from, if by URL."""
        self._counted: Principal | None = None
        """Whose open requests this one counts among."""
        self._status = CLOSED
        self._error: ErrorInfo | None = None

    async def answer(self, scope: Scope, receive: Receive) -> None:
        """Submit, relay, and turn every error into OpenAI's."""
        try:
            call = await self._submit(scope, receive)
            if call is None:
                return
            unwatch = self._watch(receive, call)
            try:
                if call.envelope.stream:
                    await self._stream(call)
                else:
                    await self._whole(call)
            finally:
                self._side._dispatcher.finish(call)
                unwatch()
                for ref in call.drop_refs():
                    self._side._blobs.remove(ref.name, if_opened=True)
        except (CallerDisconnected, OSError):
            pass  # the caller hung up, perhaps while we wrote
        except Exception as error:
            await self._refuse(to_error_info(error, self._reply.request_id))
        finally:
            if self._counted is not None:
                self._side._open.leave(self._counted)
            if self._received is not None and self._received.blobs:
                await self._received.discard()

    async def _submit(self, scope: Scope, receive: Receive) -> SyncRequest | None:
        """None: the caller wanted a durable job, and has been answered."""
        side = self._side
        headers = scope["headers"]
        principal = side._auth.check(scope)
        endpoint, dispatcher = self._endpoint, side._dispatcher
        principal.require(endpoint.scope)
        self._counted = side._open.enter(principal)
        here = self._exchange is not None and self._exchange.body_complete
        preferences = read_preferences(headers)
        reader = side._reader if preferences is None else side._durable_handler.reader
        received = self._received = await reader.read(endpoint, headers, receive, here=here, key=principal.key_id)
        request = received.request
        if side._bounds.log_prompts:
            log.debug("prompt", request_id=self._reply.request_id, body=received.body.decode(errors="replace"))
        self._type = endpoint.stream_type(request)
        if preferences is not None:
            self._error = await side._durable_handler.answer(
                DurableRequest(principal, endpoint, received, preferences, scope, receive, self._reply, self._exchange)
            )
            self._status = self._reply.status or CLOSED
            return None
        if endpoint.by_url(request):
            self._by_url = base_url(scope)
        call = dispatcher.call(
            request_id=self._reply.request_id,
            endpoint=endpoint.path,
            capability=endpoint.capability,
            lane=LANE_OF_TIER.get(request.service_tier, Lane.DEFAULT),
            public_model=endpoint.target(request, dispatcher.catalog, endpoint.capability),
            stream=self._type is not None,
            owner=principal.owner,
            received=received,
            hops=scope.get(HOPS, 0),
        )
        received.body, received.request = b"", None  # nobody reads them again, and the answer may take long
        self._call = call
        self._reply.headers.append((b"x-nexus-job-id", call.envelope.job.encode()))
        return call

    async def _whole(self, call: SyncRequest) -> None:
        await call.wait_end()
        if call.error is not None:
            await self._refuse(call.error)
        elif call.done is not None:
            self._status = 200
            if call.adapted:
                self._reply.headers += adapted_header(call.adapted)
            if call.done.blob is not None:
                await self._by_reference(call.done, call.done.blob)
                return
            answer = call.take()
            if self._by_url is not None:
                answer = self._side._url_signer.rewrite(answer, call.envelope.owner, self._by_url)
            with self._exchange.joined() if self._exchange is not None else contextlib.nullcontext():
                await self._reply.send_response(200, call.done.content_type, answer)

    async def _by_reference(self, done: AttemptDone, ref: BlobRef) -> None:
        """Pass on an answer from the blobs, never whole in memory."""
        pieces = self._side._blobs.read(ref.name)
        first = await anext(pieces, b"")  # what fails here can still be told
        reply = self._reply
        head = [(b"content-type", done.content_type.encode()), (b"content-length", b"%d" % ref.size), NO_STORE]
        await reply.send_head(200, head)
        await reply.send_chunk(first)
        async for piece in pieces:
            await reply.send_chunk(piece)
        await reply.send_end()

    def _watch(self, receive: Receive, call: SyncRequest) -> Callable[[], None]:
        """Hear the caller hang up. Returns the function that ends it."""

        def gone() -> None:
            call.abandon()
            call.wake()

        return watch_disconnect(self._exchange, receive, gone)

    async def _stream(self, call: SyncRequest) -> None:
        """Relay bytes as they come. Until the first, an error is an HTTP status."""
        if not await self._first(call):
            return
        reply, observe = self._reply, self._side._metrics.itl.observe
        model, last, between_events = call.envelope.model, monotonic(), True

        def passed_on(data: bytes) -> None:
            nonlocal last, between_events
            now = monotonic()
            observe(model, now - last)
            last, between_events = now, data.endswith(b"\n\n")

        if self._exchange is not None:
            push = self._exchange.push

            def direct(data: bytes) -> bool:
                if not push(data):
                    return False
                passed_on(data)
                return True

            call.direct = direct
        progress = call.progress
        while True:
            data = call.take()
            if data:
                await reply.send_chunk(data)
                passed_on(data)
            elif (ref := call.take_ref()) is not None:
                passed_on(await self._pass_on(ref))
            elif call.state is RequestState.ENDED:
                break
            else:
                if call.progress is not progress and between_events:  # a large event comes in several pieces
                    progress = call.progress
                    await self._comment(call)
                await call.wait()
        if call.error is not None:
            self._status = call.error.status
            await self._break_off(call.error)
        elif call.done is not None:
            await reply.send_end(DONE if self._type is SSE else b"")

    async def _pass_on(self, ref: BlobRef) -> bytes:
        """Write the blob; return its last piece."""
        piece = b""
        try:
            async for piece in self._side._blobs.read(ref.name):
                await self._reply.send_chunk(piece)
        finally:
            self._side._blobs.remove(ref.name, if_opened=True)
        return piece

    async def _first(self, call: SyncRequest) -> bool:
        """Wait for the first output. False when the call ended without any, and the caller was told so."""
        clock = call.loop.time
        comment_at = clock() + self._side._bounds.comment_after_s
        while not (call.has_output or call.state is RequestState.ENDED):
            try:
                async with asyncio.timeout_at(comment_at):
                    await call.wait()
            except TimeoutError:
                comment_at = clock() + COMMENT_EVERY_S
                await self._comment(call)
        if call.state is RequestState.ENDED and not call.has_output and not self._reply.started:
            if call.error is not None:
                await self._refuse(call.error)
                return False
            if call.done is None:
                return False
        await self._begin_stream(call.adapted)
        data = call.take()
        if data:
            await self._reply.send_chunk(data)
        return True

    async def _comment(self, call: SyncRequest) -> None:
        """Tell who watches a stream of events where it stands; other streams have no place for it."""
        if self._type is not SSE:
            return
        frame = b""
        if call.state is RequestState.QUEUED:
            with contextlib.suppress(NexusError):
                frame = comment_frame(await self._side._dispatcher.position(call))
        elif call.progress is not None:
            frame = progress_frame(call.progress)
        if frame and call.state is not RequestState.ENDED:
            await self._begin_stream()
            await self._reply.send_chunk(frame)

    async def _begin_stream(self, adapted: tuple[str, ...] = ()) -> None:
        self._status = 200
        if not self._reply.started:
            if adapted:
                self._reply.headers += adapted_header(adapted)
            await self._reply.send_head(200, [(b"content-type", self._type or SSE), *STREAM_HEADERS])
        elif adapted and self._type is SSE:
            await self._reply.send_chunk(adapted_frame(adapted))  # the head went out while the request was waiting

    async def _break_off(self, info: ErrorInfo) -> None:
        """End a stream that began well. What is no stream of events is cut off: a clean end would read as success."""
        if self._type is SSE:
            await self._reply.send_end(error_frame(info))
        elif self._exchange is not None:
            self._exchange.cut()
        else:
            raise ConnectionAbortedError(info.message)

    async def _refuse(self, info: ErrorInfo) -> None:
        self._error = info
        if self._reply.started:
            with contextlib.suppress(OSError):
                await self._break_off(info)
            return
        self._status = info.status
        with contextlib.suppress(OSError):
            await self._reply.send_error(info)

    def report(self, ended: float) -> None:
        """Metrics and the log line."""
        call, metrics, path = self._call, self._side._metrics, self._endpoint.path
        seconds = ended - self._began
        error = self._error or (call.error if call is not None else None)
        fields: dict[str, Any] = {"error": error.code or error.type} if error is not None else {}
        if call is None:
            # A name that nobody serves is the caller's invention: as a label it would grow without bound.
            metrics.child(metrics.requests, path, "", self._status).inc()
        else:
            self._count(call, seconds)
            fields |= {
                "job": call.envelope.job,
                "model": call.envelope.model,
                "worker": call.worker,
                "attempts": call.starts,
            }
        log.info(
            "request",
            request_id=self._reply.request_id,
            endpoint=path,
            status=self._status,
            seconds=round(seconds, 4),
            **fields,
        )

    def _count(self, call: SyncRequest, seconds: float) -> None:
        metrics, path = self._side._metrics, self._endpoint.path
        model, queue = call.envelope.model, call.queue
        child = metrics.child
        child(metrics.requests, path, model, self._status).inc()
        child(metrics.duration, path, model).observe(seconds)
        if call.first_at is not None:
            child(metrics.ttft, model).observe(call.first_at - self._began)
        if call.began_at is not None:
            child(metrics.queue_wait, queue.capability, queue.lane, model).observe(call.began_at - call.submitted_at)
        if call.starts > 1:
            child(metrics.attempts, model).inc()
        usage = call.done.usage if call.done is not None else None
        if usage is not None:
            child(metrics.tokens, "prompt", model).inc(usage.prompt_tokens)
            child(metrics.tokens, "completion", model).inc(usage.completion_tokens)
