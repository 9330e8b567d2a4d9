"""Serve inference endpoints on the hot path: one request, from its headers to its last byte, as a bare ASGI application.

FastAPI's routing, dependencies and response classes would add 89 µs to each request.
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
from backbone.logging import log_info
from backbone.tracing.spans import Span, Tracer
from gateway.answer_quotas import AnswerQuotas
from gateway.auth.authenticator import Authenticator, Principal, add_caller
from gateway.durable_request import DurableAnswerer, DurableRequest
from gateway.http.asgi import (
    BEGUN,
    CALLER_INFO,
    EXCHANGE,
    HOPS,
    NO_STORE,
    RATE_HEADERS,
    Caller,
    HttpExchange,
    Receive,
    Reply,
    Scope,
    Send,
    adapted_header,
    to_error_info,
    watch_disconnect,
)
from gateway.http.disconnect import CallerTasks
from gateway.http.inference_body import InferenceBodyReader, ReceivedRequest
from gateway.http.preferences import read_preferences
from gateway.http.request_body import CallerDisconnected
from gateway.http.stream_writer import StreamWriter
from gateway.inspector.inspector import Inspector, OpenInspection
from gateway.limits.budget_limiter import BudgetLimiter, Reservation
from gateway.limits.effective import NO_LIMITS, Bound, EffectiveLimits
from gateway.limits.open_requests import OpenRequestLimiter
from gateway.limits.rate_limiter import Admission, RateLimiter
from gateway.limits.tokens import estimate_tokens
from gateway.metrics import GatewayMetrics
from gateway.signed_urls import UrlSigner, base_url
from gateway.sse_frames import DONE, comment_frame, progress_frame
from gateway.sync.request_state import RequestState, SyncRequest
from gateway.sync.submitter import SyncSubmitter
from gateway.sync.usage import event_of_request
from gateway.target_model import target_model
from gateway.traces import RequestTimes, end_request, model_attributes, record_waits, start_request
from gateway.usage.emitter import UsageEmitter
from schemas.endpoints import SSE, EndpointSpec
from schemas.errors import ErrorInfo, NexusError
from schemas.frames import AttemptDone, BlobRef
from schemas.inspection import Inspection
from schemas.jobs import LANE_BY_TIER, Lane

log = structlog.get_logger(__name__)

ON_LIMIT = b"x-nexus-on-limit"
"""Header by which a caller prefers to wait (`queue`) over a 429 of a limit per minute."""
INSPECTED = (b"x-nexus-inspected", b"true")
"""Header of answers to requests that are kept for administrators."""
COMMENT_INTERVAL_S = 10.0
CLIENT_CLOSED_REQUEST = 499
"""Status in logs and metrics of a request whose caller disconnected before the answer began."""


async def _no_send(_message: object) -> None:
    """Stand for `send` until the application is called."""
    raise RuntimeError


@dataclass(frozen=True, slots=True)
class HandlerOptions:
    """Settings of inference requests."""

    comment_after_s: float
    """Seconds after which a stream without output gets its first comment."""
    log_prompts: bool = False
    has_key: Callable[[str], bool] = lambda _owner: False
    """Returns whether what is stored for a team is encrypted."""


class InferenceHandler:
    """Serves the endpoints whose requests become jobs."""

    def __init__(
        self,
        submitter: SyncSubmitter,
        reader: InferenceBodyReader,
        blobs: BlobStore,
        url_signer: UrlSigner,
        auth: Authenticator,
        metrics: GatewayMetrics,
        options: HandlerOptions,
        durable: DurableAnswerer,
        rate_limiter: RateLimiter,
        budgets: BudgetLimiter,
        caller_tasks: CallerTasks,
        answer_quotas: AnswerQuotas,
        usage: UsageEmitter | None = None,
        tracer: Tracer | None = None,
        inspector: Inspector | None = None,
    ) -> None:
        """`durable` answers the requests whose delivery preferences make them durable jobs. `usage`: None without a ledger. `tracer`: None where tracing is off."""
        self._submitter = submitter
        self._reader = reader
        self._blobs = blobs
        self._url_signer = url_signer
        self._auth = auth
        self._metrics = metrics
        self._options = options
        self._durable = durable
        self._usage = usage
        self._rate_limiter = rate_limiter
        self._budgets = budgets
        self._caller_tasks = caller_tasks
        self._tracer = tracer
        self._inspector = inspector
        self._answer_quotas = answer_quotas
        self._open_requests = OpenRequestLimiter()

    def begin(self, endpoint: EndpointSpec, scope: Scope, body: bytes) -> bool:
        """Submit a request without delivery preferences, whose body has arrived. Never raises.

        Returns whether callbacks answer it; `serve` must continue it otherwise.
        """
        exchange = _InferenceExchange(self, endpoint, Reply.to(scope, _no_send), scope.get(EXCHANGE))
        if exchange.begin(scope, body):
            return True
        scope[BEGUN] = exchange
        return False

    async def serve(self, endpoint: EndpointSpec, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises nothing but CancelledError."""
        exchange: _InferenceExchange | None = scope.get(BEGUN)
        if exchange is None:
            exchange = _InferenceExchange(self, endpoint, Reply.to(scope, send), scope.get(EXCHANGE))
        await exchange.answer(scope, receive, send)


class _InferenceExchange:
    """Answers one inference request, and reports how it ended."""

    __slots__ = (
        "_admission", "_began_at", "_bytes_in", "_caller", "_counted", "_endpoint", "_error", "_exchange", "_failure", "_handler", "_inspection", "_principal", "_received", "_reply",
        "_request", "_reservation", "_result_base_url", "_span", "_status", "_stream_type", "_usage",
    )  # fmt: skip

    def __init__(
        self, handler: InferenceHandler, endpoint: EndpointSpec, reply: Reply, exchange: HttpExchange | None
    ) -> None:
        self._handler = handler
        self._endpoint = endpoint
        self._reply = reply
        self._exchange = exchange
        self._began_at = monotonic()
        self._principal: Principal | None = None
        self._caller: Caller | None = None
        self._failure: Exception | None = None
        """Error of `begin` or of a callback, which `answer` sends."""
        self._request: SyncRequest | None = None
        self._received: ReceivedRequest | None = None
        self._stream_type: bytes | None = None
        """Content type of a streamed answer; None: the answer is sent in one piece."""
        self._result_base_url: str | None = None
        """Base of the signed URLs in the answer; None: the answer holds none."""
        self._admission: Admission | None = None
        """What the request took of its limits per minute."""
        self._reservation: Reservation | None = None
        """What the request has reserved of its budgets."""
        self._counted: tuple[Bound, ...] = ()
        """The limits on open requests that this one counts against."""
        self._status = CLIENT_CLOSED_REQUEST
        self._error: ErrorInfo | None = None
        self._usage = handler._usage
        """Takes the usage, once; None: there is no ledger, or it was told."""
        self._bytes_in = 0
        self._span: Span | None = None
        self._inspection: OpenInspection | None = None
        handler._metrics.requests_in_flight += 1

    def begin(self, scope: Scope, body: bytes) -> bool:
        """Submit the request. Returns whether callbacks answer it; `answer` must continue it otherwise."""
        exchange = self._exchange
        try:
            principal = self._authenticate(scope)
            received = self._handler._reader.read_small(self._endpoint, body)
            if received is None or exchange is None:
                return False
            if principal.limits.budgets and not self._reserve_now(principal.limits, received):
                return False
            if principal.limits.is_rated and not self._admit_now(principal.limits, received, scope):
                return False
            request = self._submit(principal, received, scope)
        except Exception as error:
            self._failure = error
            return False
        if request.envelope.stream:
            return False
        request.on_end = self._on_end
        exchange.on_disconnect(self._abandon)
        return True

    def _on_end(self) -> None:
        """Send the complete answer, as the request has ended; `answer` sends everything else."""
        request, exchange = self._request, self._exchange
        assert request is not None
        assert exchange is not None
        try:
            self._emit_usage(request)
            answered = self._send_now(request, exchange)
        except Exception as error:
            self._failure, answered = error, False
        if answered or self._failure is not None:
            self._close_request(request)
        if answered:
            self._close()
        else:
            exchange.call_app(self)

    def _send_now(self, request: SyncRequest, exchange: HttpExchange) -> bool:
        """Return whether the answer was sent, or needs not be sent."""
        done = request.done
        if request.error is not None:
            return False
        if done is None:
            return True  # the caller has disconnected
        if done.blob is not None or not exchange.writable:
            return False
        return self._reply.try_send(done.content_type, self._take_answer(request))

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submit the request, relay its answer, and turn every error into OpenAI's error object."""
        self._reply.send = send
        try:
            if self._failure is not None:
                raise self._failure
            request = self._request or await self._read(scope, receive)
            if request is None:
                return
            unwatch = watch_disconnect(self._exchange, receive, self._abandon)
            try:
                if request.envelope.stream:
                    await self._send_stream(request)
                else:
                    await self._send_whole(request)
            finally:
                self._close_request(request)
                unwatch()
        except (CallerDisconnected, OSError):
            pass  # the caller disconnected, perhaps during a write
        except Exception as error:
            await self._send_error(to_error_info(error, self._reply.request_id))
        finally:
            self._close()
            if self._received is not None and self._received.blobs:
                await self._received.discard()

    def _close_request(self, request: SyncRequest) -> None:
        """Forget the request at the bus, and remove what the caller did not read."""
        self._emit_usage(request)
        self._handler._submitter.finish(request)
        for ref in request.take_unread_blobs():
            self._handler._blobs.remove(ref.name, if_opened=True)

    def _close(self) -> None:
        """Count the end of the request, and report it."""
        handler = self._handler
        if self._admission is not None:
            self._settle(self._admission)
        if self._reservation is not None:  # there was no request
            self._reservation.release()
        if self._counted:
            handler._open_requests.release(self._counted)
        handler._metrics.requests_in_flight -= 1
        # Deferred until the loop has written the answer: the caller does not wait for logs and metrics.
        asyncio.get_running_loop().call_soon(self.report, monotonic())

    def _authenticate(self, scope: Scope) -> Principal:
        handler = self._handler
        self._caller = scope.get(CALLER_INFO)
        principal = self._principal = handler._auth.authenticate(scope)
        principal.require(self._endpoint.scope)
        if handler._tracer is not None:
            path, request_id, headers = self._endpoint.path, self._reply.request_id, scope["headers"]
            self._span = start_request(handler._tracer, path, request_id, principal.owner, headers, self._began_at)
        if principal.limits.open:
            self._counted = handler._open_requests.acquire(principal.limits)
        return principal

    async def _read(self, scope: Scope, receive: Receive) -> SyncRequest | None:
        """Authenticate, read and submit the request. None: it became a durable job, and was answered."""
        handler, endpoint, headers = self._handler, self._endpoint, scope["headers"]
        principal = self._principal or self._authenticate(scope)
        has_arrived = self._exchange is not None and self._exchange.body_complete
        preferences = read_preferences(headers)
        reader = handler._reader if preferences is None else handler._durable.reader
        received = self._received = await reader.read(
            endpoint,
            headers,
            receive,
            has_arrived=has_arrived,
            owner=principal.owner,
            max_pending_bytes=principal.limits.pending_bytes,
        )
        if preferences is None:
            if principal.limits.budgets and self._reservation is None:
                await self._reserve(principal.limits, received)
            if principal.limits.is_rated and self._admission is None:
                await self._admit(principal.limits, received, scope, receive)
            return self._submit(principal, received, scope)
        self._accept(received)
        self._error = await handler._durable.answer(
            DurableRequest(
                principal, endpoint, received, preferences, scope, receive, self._reply, self._exchange, self._span
            )
        )
        self._status = self._reply.status or CLIENT_CLOSED_REQUEST
        return None

    def _accept(self, received: ReceivedRequest) -> None:
        self._stream_type = self._endpoint.stream_type(received.request)
        if self._handler._options.log_prompts and self._principal is not None and not self._is_sealed(self._principal):
            log.debug("request.prompt", request_id=self._reply.request_id, body=received.body.decode(errors="replace"))

    def _is_sealed(self, principal: Principal) -> bool:
        return principal.limits.retain_none or self._handler._options.has_key(principal.owner)

    def _submit(self, principal: Principal, received: ReceivedRequest, scope: Scope) -> SyncRequest:
        endpoint, submitter, body = self._endpoint, self._handler._submitter, received.request
        self._accept(received)
        if endpoint.by_url(body):
            principal.limits.require_retention("Set 'response_format' to 'b64_json'.", "response_format")
            self._result_base_url = base_url(scope)
        lane = LANE_BY_TIER.get(body.service_tier, Lane.DEFAULT)
        public_model = target_model(endpoint, body, submitter.catalog)
        if principal.limits is not NO_LIMITS:
            principal.limits.require_model(public_model)
            principal.limits.require_lane(lane)
        request = submitter.submit(
            request_id=self._reply.request_id,
            endpoint=endpoint.path if endpoint.translation is None else endpoint.translation.target.path,
            capability=endpoint.capability,
            lane=lane,
            public_model=public_model,
            stream=self._stream_type is not None,
            owner=principal.owner,
            received=received,
            hops=scope.get(HOPS, 0),
            sealed=self._is_sealed(principal),
            span=self._span,
        )
        if self._usage is not None:
            self._bytes_in = received.total_bytes
        if principal.limits.inspection is not None:
            self._inspect(principal, principal.limits.inspection, received)
        received.body, received.request = b"", None  # unused from here on, and the answer may take long
        self._request = request
        self._reply.headers.append((b"x-nexus-job-id", request.envelope.job.encode()))
        return request

    def _inspect(self, principal: Principal, inspection: Inspection, received: ReceivedRequest) -> None:
        """Keep the request for administrators, and tell its caller so."""
        inspector = self._handler._inspector
        if inspector is None:
            return
        self._inspection = inspector.open(
            inspection,
            owner=principal.owner,
            key=principal.key_id,
            request_id=self._reply.request_id,
            endpoint=self._endpoint.path,
            body=received.body,
        )
        if self._inspection is not None:
            self._reply.headers.append(INSPECTED)

    def _admit_now(self, limits: EffectiveLimits, received: ReceivedRequest, scope: Scope) -> bool:
        """Take the request's part of its limits per minute, if it is here."""
        limiter = self._handler._rate_limiter
        admission = limiter.try_admit(limits, self._estimated_tokens(limits, received))
        if admission is not None:
            self._enter(admission, limits, scope)
        return admission is not None

    async def _admit(self, limits: EffectiveLimits, received: ReceivedRequest, scope: Scope, receive: Receive) -> None:
        """Take the request's part of its limits per minute, in turn if the caller prefers to wait. Raises RateLimited, CallerDisconnected."""
        if self._admit_now(limits, received, scope):
            return
        limiter, tokens = self._handler._rate_limiter, self._estimated_tokens(limits, received)
        if (ON_LIMIT, b"queue") in scope["headers"]:
            self._stream_type = self._endpoint.stream_type(received.request)
            writer = StreamWriter(self._reply, self._stream_type or b"")

            async def report(place: int) -> None:
                await writer.comment(comment_frame(place))

            in_turn = limiter.admit_in_turn(limits, tokens, report)
            admission = await self._handler._caller_tasks.run_while_connected(in_turn, scope, receive)
        else:
            admission = await limiter.admit(limits, tokens)
        self._enter(admission, limits, scope)

    def _reserve_now(self, limits: EffectiveLimits, received: ReceivedRequest) -> bool:
        """Reserve the request's estimate of its budgets, if the shares suffice."""
        size = received.body_size or len(received.body)
        self._reservation = self._handler._budgets.try_reserve(
            limits, self._endpoint.capability, received.request, size
        )
        return self._reservation is not None

    async def _reserve(self, limits: EffectiveLimits, received: ReceivedRequest) -> None:
        """Reserve the request's estimate of its budgets. Raises InsufficientQuota, RateLimited."""
        size = received.body_size or len(received.body)
        self._reservation = await self._handler._budgets.reserve(
            limits, self._endpoint.capability, received.request, size
        )

    def _estimated_tokens(self, limits: EffectiveLimits, received: ReceivedRequest) -> int:
        if not limits.tokens:
            return 0
        size = received.body_size or len(received.body)
        return estimate_tokens(self._endpoint.capability, received.request, size)

    def _enter(self, admission: Admission, limits: EffectiveLimits, scope: Scope) -> None:
        """Keep the admission, and tell what is left of the limits."""
        self._admission = admission
        self._reply.headers += self._handler._rate_limiter.headers(limits)
        scope[RATE_HEADERS] = None

    def _settle(self, admission: Admission) -> None:
        """Replace the estimated tokens by the real ones: none for a request that no worker began."""
        request = self._request
        usage = request.done.usage if request is not None and request.done is not None else None
        if usage is not None:
            admission.settle(usage.total_tokens or usage.prompt_tokens + usage.completion_tokens)
        elif request is None or not request.starts:
            admission.settle(0)

    async def _send_whole(self, request: SyncRequest) -> None:
        """Wait for the end of the request, and send its answer in one piece, or its error."""
        await request.wait_until_ended()
        self._emit_usage(request)
        if request.error is not None:
            await self._send_error(request.error)
        elif request.done is not None:
            answer = self._take_answer(request)
            if request.done.blob is not None:
                await self._send_blob(request.done, request.done.blob)
            else:
                await self._reply.send_response(200, request.done.content_type, answer)

    def _take_answer(self, request: SyncRequest) -> bytes:
        """Return the complete answer, empty if it travels by reference, and add the headers that depend on it."""
        self._status = 200
        if request.adapted:
            self._reply.headers += adapted_header(request.adapted)
        answer = request.take_output()
        if self._inspection is not None:
            self._inspection.add_output(answer)
        if answer and self._result_base_url is not None:
            assert self._principal is not None
            owner, key_id = self._principal.owner, self._principal.key_id
            self._handler._answer_quotas.count_urls(owner, self._principal.limits.result_bytes, answer)
            return self._handler._url_signer.sign_urls(answer, owner, self._result_base_url, key_id)
        return answer

    def _emit_usage(self, request: SyncRequest) -> None:
        """Write down what the request used, before its caller has the whole answer: a kill in between loses nothing."""
        usage, self._usage = self._usage, None
        reservation, self._reservation = self._reservation, None
        if usage is None and reservation is None:
            return
        assert self._principal is not None
        event = event_of_request(
            request, self._endpoint.path, self._principal.key_id, self._principal.person, self._bytes_in
        )
        if usage is not None:
            usage.emit(event)
        if reservation is not None:
            reservation.settle(event)

    async def _send_blob(self, done: AttemptDone, ref: BlobRef) -> None:
        """Send an answer that travels by reference, piece by piece."""
        assert self._principal is not None
        quotas, most = self._handler._answer_quotas, self._principal.limits.pending_bytes
        async with quotas.sending(self._principal.owner, most, ref):
            pieces = self._handler._blobs.read(ref.name)
            first = await anext(pieces, b"")  # an error here still becomes an HTTP status
            reply = self._reply
            head = [(b"content-type", done.content_type.encode()), (b"content-length", b"%d" % ref.size), NO_STORE]
            await reply.send_head(200, head)
            await reply.send_chunk(first)
            async for piece in pieces:
                await reply.send_chunk(piece)
            await reply.send_end()

    def _abandon(self) -> None:
        """Abandon the request, as the caller has disconnected."""
        if self._request is not None:
            self._request.abandon()
            self._request.wake()

    async def _send_stream(self, request: SyncRequest) -> None:
        """Relay output as it comes. An error before the first output is sent as an HTTP status."""
        writer = StreamWriter(self._reply, self._stream_type or SSE)
        if not await self._begin_with_output(request, writer):
            return
        observe = self._handler._metrics.itl.observe
        model, last, between_events = request.envelope.model, monotonic(), True

        def note_chunk(data: bytes) -> None:
            nonlocal last, between_events
            now = monotonic()
            observe(now - last, model)
            last, between_events = now, data.endswith(b"\n\n")

        note = note_chunk if self._inspection is None else self._inspection.observing(note_chunk)
        if self._exchange is not None:
            push = self._exchange.try_write

            def write_directly(data: bytes) -> bool:
                if not push(data):
                    return False
                note(data)
                return True

            request.direct_writer = write_directly
        progress = request.progress
        while True:
            data = request.take_output()
            if data:
                await writer.write(data)
                note(data)
            elif (ref := request.take_blob()) is not None:
                note(await self._relay_blob(ref))
            elif request.state is RequestState.ENDED:
                break
            else:
                if request.progress is not progress and between_events:  # a large event comes in several pieces
                    progress = request.progress
                    await self._send_comment(request, writer)
                await request.wait()
        self._emit_usage(request)
        if request.error is not None:
            self._status = request.error.status
            await writer.abort(request.error)
        elif request.done is not None:
            await writer.end(DONE)

    async def _relay_blob(self, ref: BlobRef) -> bytes:
        """Send the blob's bytes and remove it. Returns its last piece."""
        blobs = self._handler._blobs
        piece = b""
        try:
            async for piece in blobs.read(ref.name):
                await self._reply.send_chunk(piece)
        finally:
            blobs.remove(ref.name, if_opened=True)
        return piece

    async def _begin_with_output(self, request: SyncRequest, writer: StreamWriter) -> bool:
        """Wait for the first output and begin the stream with it. False: the request ended without output, and was answered."""
        clock = request.loop.time
        comment_at = clock() + self._handler._options.comment_after_s
        while not (request.has_output or request.state is RequestState.ENDED):
            try:
                async with asyncio.timeout_at(comment_at):
                    await request.wait()
            except TimeoutError:
                comment_at = clock() + COMMENT_INTERVAL_S
                await self._send_comment(request, writer)
        if request.state is RequestState.ENDED and not request.has_output and not self._reply.started:
            if request.error is not None:
                await self._send_error(request.error)
                return False
            if request.done is None:
                return False
        self._status = 200
        await writer.adapt(request.adapted)
        await writer.begin()
        output = request.take_output()
        if self._inspection is not None:
            self._inspection.add_output(output)
        await writer.write(output)
        return True

    async def _send_comment(self, request: SyncRequest, writer: StreamWriter) -> None:
        """Send the queue position or the progress as a comment."""
        if self._stream_type is not SSE:
            return
        frame = b""
        if request.state is RequestState.QUEUED:
            with contextlib.suppress(NexusError):
                frame = comment_frame(await self._handler._submitter.position(request))
        elif request.progress is not None:
            frame = progress_frame(request.progress)
        if frame and request.state is not RequestState.ENDED:
            self._status = 200
            await writer.comment(frame)

    async def _send_error(self, info: ErrorInfo) -> None:
        self._error = info
        if not self._reply.started:
            self._status = info.status
        with contextlib.suppress(OSError):
            await StreamWriter(self._reply, self._stream_type or b"").abort(info)

    def report(self, ended_at: float) -> None:
        """Record the metrics of the request and log it. `ended_at`: by `monotonic`."""
        request, metrics, path = self._request, self._handler._metrics, self._endpoint.path
        seconds = ended_at - self._began_at
        error = self._error or (request.error if request is not None else None)
        fields: dict[str, Any] = {
            "request_id": self._reply.request_id,
            "endpoint": path,
            "status": self._status,
            "seconds": round(seconds, 4),
        }
        add_caller(fields, self._principal, self._caller)
        if error is not None:
            fields["error"] = error.code or error.type
        if request is None:
            # The model's name is the caller's invention here: as a label it would grow without bound.
            metrics.child(metrics.requests, path, "", self._status).inc()
        else:
            self._record_metrics(request, seconds)
            fields["job"], fields["model"] = request.envelope.job, request.envelope.model
            fields["worker"], fields["attempts"] = request.worker, request.starts
            if self._inspection is not None:
                self._store_inspection(self._inspection, request, ended_at, error)
        if self._span is not None:
            fields["trace_id"] = self._span.context.trace_id
            self._end_trace(self._span, request, ended_at, error)
        log_info("request.finished", fields)

    def _end_trace(self, span: Span, request: SyncRequest | None, ended_at: float, error: ErrorInfo | None) -> None:
        tracer = self._handler._tracer
        if request is not None and request.trace is not None and tracer is not None and span.is_recorded:
            envelope = request.envelope
            span.set_attributes(
                model_attributes(envelope.capability, envelope.public_model, envelope.model)
                | {"nexus.job": envelope.job, "nexus.attempts": request.starts}
            )
            times = RequestTimes(request.submitted_at, request.started_at, request.first_output_at)
            record_waits(tracer, span, envelope, times, request.trace, ended_at)
            self._add_exemplars(request, ended_at, span.context.trace_id)
        end_request(span, self._status, ended_at, (error.code or error.type) if error is not None else "")

    def _store_inspection(
        self, opened: OpenInspection, request: SyncRequest, ended_at: float, error: ErrorInfo | None
    ) -> None:
        def since_start(at: float | None) -> float | None:
            return None if at is None else round(at - self._began_at, 4)

        inspector, done = self._handler._inspector, request.done
        assert inspector is not None
        content_type = (self._stream_type or b"").decode() or (done.content_type if done is not None else "")
        inspector.store(
            opened,
            request.envelope.job,
            request.envelope.public_model,
            content_type=content_type,
            status=self._status,
            error=(error.code or error.type) if error is not None else None,
            worker=request.worker,
            attempts=request.starts,
            queue_s=since_start(request.started_at),
            first_token_s=since_start(request.first_output_at),
            seconds=since_start(ended_at),
        )

    def _add_exemplars(self, request: SyncRequest, ended_at: float, trace_id: str) -> None:
        metrics, path, model = self._handler._metrics, self._endpoint.path, request.envelope.model
        metrics.duration.add_exemplar(ended_at - self._began_at, trace_id, path, model)
        if request.first_output_at is not None:
            metrics.ttft.add_exemplar(request.first_output_at - self._began_at, trace_id, model)

    def _record_metrics(self, request: SyncRequest, seconds: float) -> None:
        metrics, path = self._handler._metrics, self._endpoint.path
        model, queue = request.envelope.model, request.queue
        child = metrics.child
        child(metrics.requests, path, model, self._status).inc()
        metrics.duration.observe(seconds, path, model)
        if request.first_output_at is not None:
            metrics.ttft.observe(request.first_output_at - self._began_at, model)
        if request.started_at is not None:
            queue_wait_s = request.started_at - request.submitted_at
            metrics.queue_wait.observe(queue_wait_s, queue.capability, queue.lane, model)
        if request.starts > 1:
            child(metrics.attempts, model).inc()
        usage = request.done.usage if request.done is not None else None
        if usage is not None:
            child(metrics.tokens, "prompt", model).inc(usage.prompt_tokens)
            child(metrics.tokens, "completion", model).inc(usage.completion_tokens)
