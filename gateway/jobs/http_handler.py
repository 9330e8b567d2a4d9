"""Serves durable jobs as plain ASGI: `POST /v1/jobs`, `GET /v1/jobs/{id}`, and inference requests with delivery preferences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any
from urllib.parse import parse_qs

import orjson
import structlog

from backbone.tracing.spans import Span, Tracer
from gateway.audit.actions import ENDPOINT_ACTIONS
from gateway.audit.audit_log import AuditLog
from gateway.audit.entry import AUDIT_ENTRY, entry_of
from gateway.auth.authenticator import Authenticator, Principal, caller_fields
from gateway.durable_request import DurableRequest
from gateway.files import FileReferences
from gateway.http.asgi import CALLER_INFO, Receive, Reply, Scope, Send, body_is_complete, to_error_info
from gateway.http.disconnect import CallerTasks
from gateway.http.inference_body import InferenceBodyReader, ReceivedRequest
from gateway.http.preferences import MAX_WAIT_S, read_preferences
from gateway.http.request_body import CallerDisconnected, parse_body
from gateway.jobs.api import EventsExpired, JobResult, JobsApi, Submission
from gateway.jobs.http_response import JobResponder
from gateway.jobs.idempotency import Idempotency
from gateway.jobs.records import job_object
from gateway.limits.followers import FollowerLimiter
from gateway.signed_urls import base_url
from gateway.traces import end_request, start_request
from schemas.endpoints import EndpointSpec
from schemas.errors import ErrorInfo, InvalidRequest, NexusError, NotFound, Unavailable
from schemas.jobs import TERMINAL_STATUSES, JobRecord, Lane
from schemas.keys import Scope as KeyScope
from schemas.submission import SubmitRequest

log = structlog.get_logger(__name__)

PATH = "/v1/jobs"
CLIENT_CLOSED = 499
"""The status where the caller disconnected before the answer."""


class DurableRequestHandler:
    """Serves `POST /v1/jobs`, and inference requests that become durable jobs because of their headers."""

    def __init__(
        self,
        jobs: JobsApi,
        responder: JobResponder,
        caller_tasks: CallerTasks,
        idempotency: Idempotency,
        reader: InferenceBodyReader,
        auth: Authenticator,
        endpoints: Mapping[str, EndpointSpec],
        uploads: FileReferences,
        check_url: Callable[[str], None],
        audit_log: AuditLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Create a handler. `tracer`: None where tracing is off.

        `reader` stores blobs for the lifetime of a job. `check_url` raises InvalidRequest for an invalid webhook URL.
        """
        self._jobs = jobs
        self._responder = responder
        self._caller_tasks = caller_tasks
        self._idempotency = idempotency
        self.reader = reader
        self._auth = auth
        self._endpoints = endpoints
        self._uploads = uploads
        self._audit_log = audit_log
        self._check_url = check_url
        self._tracer = tracer

    # Inference requests

    async def answer(self, request: DurableRequest) -> ErrorInfo | None:
        """Submit a request and send its response. Return the error that was sent.

        The job continues if the caller disconnects. Raises NexusError, CallerDisconnected.
        """
        preferences, owner, reply = request.preferences, request.principal.owner, request.reply
        if preferences.respond_async:
            request.principal.require(KeyScope.JOBS)
        submission = Submission(
            principal=request.principal,
            endpoint=request.endpoint,
            received=request.received,
            request_id=reply.request_id,
            span=request.span,
            caller_waits=not preferences.respond_async,
        )
        if preferences.key:
            submission.job_id = await self._idempotency.job_id(
                owner, preferences.key, request.endpoint.path, request.received
            )
        record = await self._jobs.submit(submission)
        reply.headers.append((b"x-nexus-job-id", record.job.encode()))
        if preferences.respond_async:
            result = await self._result_within_wait(request, record) if preferences.wait_s else None
            if result is None:
                await self._responder.send_accepted(reply, record, preferences)
                return None
            return await self._responder.send_result(reply, result, base_url(request.scope))
        return await self._caller_tasks.run_while_connected(
            self._answer_synchronously(request, record), request.scope, request.receive
        )

    async def _result_within_wait(self, request: DurableRequest, record: JobRecord) -> JobResult | None:
        """Return the job's result if it ends within the preferred wait, else None. Raises CallerDisconnected."""
        if record.status in TERMINAL_STATUSES:
            return await self._jobs.result(record.owner, record.job)
        outcome = self._jobs.wait_for_result(record.owner, record.job, request.preferences.wait_s or 0.0)
        try:
            return await self._caller_tasks.run_while_connected(outcome, request.scope, request.receive)
        except Unavailable:
            if not self._caller_tasks.is_shutting_down:
                raise
            return None

    async def _answer_synchronously(self, request: DurableRequest, record: JobRecord) -> ErrorInfo | None:
        """Send the response as for a synchronous request, and return the error that was sent."""
        content_type = request.endpoint.stream_type(request.received.request)
        if content_type is not None:
            try:
                return await self._responder.relay_stream(
                    request.reply, record, content_type, request.exchange, ids=request.preferences.resume
                )
            except EventsExpired:
                if request.reply.started:
                    raise
                # The result is stored longer than the events and contains all of them.
        if record.status in TERMINAL_STATUSES:
            result = await self._jobs.result(record.owner, record.job)
        else:
            result = await self._responder.wait_for_result(record.owner, record.job)
        return await self._responder.send_result(request.reply, result, base_url(request.scope))

    # POST /v1/jobs

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one `POST /v1/jobs`. Raises nothing but CancelledError."""
        reply = Reply.to(scope, send)
        info: ErrorInfo | None = None
        job = ""
        principal: Principal | None = None
        span: Span | None = None
        try:
            principal = self._auth.authenticate(scope)
            if self._tracer is not None:
                headers, began_at = scope["headers"], monotonic()
                span = start_request(self._tracer, PATH, reply.request_id, principal.owner, headers, began_at)
            job = await self._submit(principal, scope, receive, reply, span)
        except (CallerDisconnected, OSError):
            entry_of(scope).end(CLIENT_CLOSED)
            if span is not None:
                end_request(span, CLIENT_CLOSED, monotonic())
            return
        except Exception as error:
            info = to_error_info(error, reply.request_id)
        if info is not None:
            entry_of(scope).end(info.status, info.code or info.type)
            if not reply.started:
                await reply.send_error(info)
        traced: dict[str, str] = {}
        if span is not None:
            traced["trace_id"] = span.context.trace_id
            end_request(span, reply.status, monotonic(), (info.code or info.type) if info is not None else "")
        log.info(
            "request.finished",
            request_id=reply.request_id,
            endpoint=PATH,
            status=reply.status,
            **caller_fields(principal, scope.get(CALLER_INFO)),
            **({"error": info.code or info.type} if info is not None else {"job": job}),
            **traced,
        )

    async def _submit(
        self, principal: Principal, scope: Scope, receive: Receive, reply: Reply, span: Span | None
    ) -> str:
        """Submit the job and return its id."""
        headers = scope["headers"]
        principal.require(KeyScope.JOBS)
        principal.require(KeyScope.INFERENCE)
        preferences = read_preferences(headers)
        has_arrived = body_is_complete(scope)
        with self.reader.memory.share(principal.owner) as share:
            request = parse_body(
                await self.reader.read_body(headers, receive, share, has_arrived=has_arrived), SubmitRequest
            )
            endpoint = self._require_endpoint(principal, request, scope)
            received = await self._read_body(principal, endpoint, request.body)
            request.body.clear()
        try:
            submission = Submission(
                principal=principal,
                endpoint=endpoint,
                received=received,
                request_id=reply.request_id,
                lane=Lane(request.service_tier) if request.service_tier else None,
                metadata=request.metadata,
                webhook=request.webhook.url if request.webhook is not None else "",
                timeout_s=request.timeout,
                span=span,
            )
            if preferences is not None and preferences.key:
                about = request.model_dump(mode="json", exclude={"body"})
                submission.job_id = await self._idempotency.job_id(
                    principal.owner, preferences.key, f"{PATH} {endpoint.path}", received, about
                )
            record = await self._jobs.submit(submission)
        except (InvalidRequest, NotFound) as error:
            raise _in_body(error) from None
        finally:
            if received.blobs:
                await received.discard()
        reply.headers.append((b"x-nexus-job-id", record.job.encode()))
        if AUDIT_ENTRY in scope:
            entry = entry_of(scope)
            entry.details["job"] = record.job
            entry.end(202)
        await self._responder.send_accepted(reply, record, preferences)
        return record.job

    def _require_endpoint(self, principal: Principal, request: SubmitRequest, scope: Scope) -> EndpointSpec:
        """Return the job's endpoint. Raises InvalidRequest, PermissionDenied."""
        endpoint = self._endpoints.get(request.endpoint)
        if endpoint is None:
            raise InvalidRequest(
                f"'{request.endpoint}' does not accept jobs. Use one of: {', '.join(sorted(self._endpoints))}.",
                param="endpoint",
            )
        if endpoint.path in ENDPOINT_ACTIONS:
            self._require_recorded(principal, endpoint, request, scope)
        principal.require(endpoint.scope)
        if request.webhook is not None:
            self._check_url(request.webhook.url)
        return endpoint

    def _require_recorded(
        self, principal: Principal, endpoint: EndpointSpec, request: SubmitRequest, scope: Scope
    ) -> None:
        """Check the scope of an endpoint whose requests are administrative, and begin to record this one. Raises PermissionDenied."""
        if self._audit_log is not None:
            self._audit_log.open(ENDPOINT_ACTIONS[endpoint.path], scope, reads=False)
        entry = entry_of(scope)
        entry.target = str(request.body.get("model", ""))
        entry.identify(principal)
        principal.require(endpoint.scope)
        entry.allow()

    async def _read_body(self, principal: Principal, endpoint: EndpointSpec, body: dict[str, Any]) -> ReceivedRequest:
        """Validate the job's body. Errors name the field's path in the whole request: `body.messages`."""
        reader = self.reader.of(principal.owner, principal.limits.pending_bytes)
        try:
            if endpoint.files:
                fields, uploads = await self._uploads.resolve(principal.owner, endpoint, body)
                return await reader.read_value(endpoint, fields, uploads)
            return await reader.read_value(endpoint, body)
        except (InvalidRequest, NotFound) as error:
            raise _in_body(error) from None


def _in_body(error: NexusError) -> NexusError:
    """Return the error with its field's path in the whole request."""
    param = error.info.param
    return NexusError.from_info(error.info.model_copy(update={"param": f"body.{param}" if param else "body"}))


PREFIX = "/v1/jobs/"
EXPORT = "export"
"""The segment that names no job in `GET /v1/jobs/export`."""


def polled_job_id(path: str) -> str:
    """Return the job id in the path of a job. Empty if the path is not that of a job."""
    rest = path.removeprefix(PREFIX) if path.startswith(PREFIX) else ""
    return "" if "/" in rest or rest == EXPORT else rest


async def job_with_estimate(jobs: JobsApi, record: JobRecord) -> dict[str, Any]:
    """Return the API's job object with queue position and estimate."""
    position, eta_s = await jobs.estimate(record)
    return job_object(record, position=position, eta_s=eta_s)


class JobPollHandler:
    """Serves `GET /v1/jobs/{id}`."""

    def __init__(
        self, jobs: JobsApi, caller_tasks: CallerTasks, auth: Authenticator, followers: FollowerLimiter
    ) -> None:
        self._jobs = jobs
        self._followers = followers
        self._caller_tasks = caller_tasks
        self._auth = auth

    async def serve(self, job_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the job. With `?wait=N`, wait up to N seconds (at most 300) for its end. Raises nothing but CancelledError."""
        reply = Reply.to(scope, send)
        info: ErrorInfo | None = None
        try:
            caller = self._auth.authenticate(scope)
            caller.require(KeyScope.JOBS)
            seconds = _wait_s(scope["query_string"])
            if seconds:
                with self._followers.hold(caller.limits):
                    await self._wait(caller.owner, job_id, seconds, scope, receive)
            record = await self._jobs.get(caller.owner, job_id)
            await reply.send_response(
                200, "application/json", orjson.dumps(await job_with_estimate(self._jobs, record))
            )
        except (CallerDisconnected, OSError):
            return
        except Exception as error:
            info = to_error_info(error, reply.request_id)
        if info is not None and not reply.started:
            await reply.send_error(info)

    async def _wait(self, owner: str, job_id: str, seconds: float, scope: Scope, receive: Receive) -> None:
        """Wait until the job has ended, the time is up or the gateway shuts down. Raises CallerDisconnected."""
        try:
            await self._caller_tasks.run_while_connected(self._jobs.wait(owner, job_id, seconds), scope, receive)
        except Unavailable:
            if not self._caller_tasks.is_shutting_down:
                raise


def _wait_s(query: bytes) -> float:
    """Parse the seconds of `?wait=N`, at most `MAX_WAIT_S`. Raises InvalidRequest."""
    if not query:
        return 0.0
    text = parse_qs(query.decode("latin-1")).get("wait", ["0"])[-1]
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidRequest(f"'wait' must be a number of seconds, not '{text[:50]}'.", param="wait")
    return min(seconds, MAX_WAIT_S)
