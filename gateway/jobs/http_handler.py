"""Requests that become durable jobs, as bare ASGI: `POST /v1/jobs`, and inference requests whose callers wish it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import orjson
import structlog

from gateway.auth.authenticator import Auth, Principal
from gateway.endpoints import Endpoint
from gateway.files import FileUploads
from gateway.http.asgi import Line, Receive, Reply, Scope, Send, is_here, request_id_of, told_as
from gateway.http.disconnect import Waiting
from gateway.http.inference_body import Reader, Received
from gateway.http.preferences import MAX_WAIT_S, Wish, wish_of
from gateway.http.request_body import CallerGone, parse
from gateway.jobs.api import EventsExpired, Jobs, Result, Submission
from gateway.jobs.http_response import JobResponder
from gateway.jobs.idempotency import Idempotency
from gateway.jobs.records import shape
from gateway.signed_urls import base_url
from schemas.errors import ErrorInfo, InvalidRequest, NexusError, NotFound, Unavailable
from schemas.jobs import TERMINAL_STATUSES, JobRecord, Lane
from schemas.keys import Scope as KeyScope
from schemas.submission import SubmitRequest

log = structlog.get_logger(__name__)

PATH = "/v1/jobs"


@dataclass(frozen=True, slots=True)
class DurableRequest:
    """An inference request that is to become a durable job."""

    principal: Principal
    endpoint: Endpoint
    received: Received
    wish: Wish
    scope: Scope
    receive: Receive
    reply: Reply
    line: Line | None


class DurableRequestHandler:
    """See the module's docstring."""

    def __init__(
        self,
        jobs: Jobs,
        answers: JobResponder,
        waiting: Waiting,
        idempotency: Idempotency,
        reader: Reader,
        auth: Auth,
        endpoints: Mapping[str, Endpoint],
        uploads: FileUploads,
        check_url: Callable[[str], None],
    ) -> None:
        """`reader`: its blobs last as long as a job may. `check_url` raises InvalidRequest for what no webhook can be."""
        self._jobs = jobs
        self._answers = answers
        self._waiting = waiting
        self._idempotency = idempotency
        self.reader = reader
        self._auth = auth
        self._endpoints = endpoints
        self._uploads = uploads
        self._check_url = check_url

    # Wishes

    async def answer(self, asked: DurableRequest) -> ErrorInfo | None:
        """Answer one request; what it submits goes on whoever hangs up. Returns the error it was answered with.

        Raises NexusError, and CallerGone.
        """
        wish, owner, reply = asked.wish, asked.principal.owner, asked.reply
        if wish.respond_async:
            asked.principal.require(KeyScope.JOBS)
        submission = Submission(
            principal=asked.principal,
            endpoint=asked.endpoint,
            received=asked.received,
            request_id=reply.request_id,
            caller_waits=not wish.respond_async,
        )
        if wish.key:
            submission.job_id = await self._idempotency.job_id(owner, wish.key, asked.endpoint.path, asked.received)
        record = await self._jobs.submit(submission)
        reply.headers.append((b"x-nexus-job-id", record.id.encode()))
        if wish.respond_async:
            result = await self._soon(asked, record) if wish.wait_s else None
            if result is None:
                await self._answers.accepted(reply, record, wish)
                return None
            return await self._answers.result(reply, result, base_url(asked.scope), asked.line)
        return await self._waiting.while_there(self._as_usual(asked, record), asked.scope, asked.receive)

    async def _soon(self, asked: DurableRequest, record: JobRecord) -> Result | None:
        """How the job ended, if it has in the time that the caller waits. Raises CallerGone."""
        if record.status in TERMINAL_STATUSES:
            return await self._jobs.result(record.owner, record.id)
        outcome = self._jobs.outcome(record.owner, record.id, asked.wish.wait_s or 0.0)
        try:
            return await self._waiting.while_there(outcome, asked.scope, asked.receive)
        except Unavailable:
            if not self._waiting.ending:
                raise
            return None

    async def _as_usual(self, asked: DurableRequest, record: JobRecord) -> ErrorInfo | None:
        """Answer as a synchronous request is answered."""
        content_type = asked.endpoint.stream_type(asked.received.request)
        if content_type is not None:
            try:
                return await self._answers.relay(asked.reply, record, content_type, asked.line, ids=asked.wish.resume)
            except EventsExpired:
                if asked.reply.started:
                    raise
                # The answer is kept longer, and is all of them.
        if record.status in TERMINAL_STATUSES:
            result = await self._jobs.result(record.owner, record.id)
        else:
            result = await self._answers.until_ended(record.owner, record.id)
        return await self._answers.result(asked.reply, result, base_url(asked.scope), asked.line)

    # POST /v1/jobs

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one `POST /v1/jobs`. Never raises, but for cancellation."""
        reply = Reply(send, request_id_of(scope))
        info: ErrorInfo | None = None
        job = ""
        try:
            job = await self._submit(scope, receive, reply)
        except (CallerGone, OSError):
            return
        except Exception as error:
            info = told_as(error, reply.request_id)
        if info is not None and not reply.started:
            await reply.error(info)
        log.info(
            "request",
            request_id=reply.request_id,
            endpoint=PATH,
            status=reply.status,
            **({"error": info.code or info.type} if info is not None else {"job": job}),
        )

    async def _submit(self, scope: Scope, receive: Receive, reply: Reply) -> str:
        """The job's id."""
        headers = scope["headers"]
        principal = self._auth.check(scope)
        principal.require(KeyScope.JOBS)
        principal.require(KeyScope.INFERENCE)
        wish = wish_of(headers)
        here = is_here(scope)
        with self.reader.memory.share(principal.key_id) as share:
            request = parse(await self.reader.body(headers, receive, share, here=here), SubmitRequest)
            endpoint = self._checked(principal, request)
            received = await self._received(principal, endpoint, request.body)
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
            )
            if wish is not None and wish.key:
                about = request.model_dump(mode="json", exclude={"body"})
                submission.job_id = await self._idempotency.job_id(
                    principal.owner, wish.key, f"{PATH} {endpoint.path}", received, about
                )
            record = await self._jobs.submit(submission)
        except (InvalidRequest, NotFound) as error:
            raise _within_body(error) from None
        finally:
            if received.blobs:
                await received.discard()
        reply.headers.append((b"x-nexus-job-id", record.id.encode()))
        await self._answers.accepted(reply, record, wish)
        return record.id

    def _checked(self, principal: Principal, request: SubmitRequest) -> Endpoint:
        """What it is for. Raises InvalidRequest, PermissionDenied."""
        endpoint = self._endpoints.get(request.endpoint)
        if endpoint is None:
            raise InvalidRequest(
                f"'{request.endpoint}' takes no jobs; these do: {', '.join(sorted(self._endpoints))}", param="endpoint"
            )
        principal.require(endpoint.scope)
        if request.webhook is not None:
            self._check_url(request.webhook.url)
        return endpoint

    async def _received(self, principal: Principal, endpoint: Endpoint, body: dict[str, Any]) -> Received:
        """Problems are named by their place in the whole request: `body.messages`."""
        try:
            if endpoint.files:
                fields, uploads = await self._uploads.take(principal.owner, endpoint, body)
                return await self.reader.of_value(endpoint, fields, uploads)
            return await self.reader.of_value(endpoint, body)
        except (InvalidRequest, NotFound) as error:
            raise _within_body(error) from None


def _within_body(error: NexusError) -> NexusError:
    """The same, with the place of what is wrong in the whole request."""
    param = error.info.param
    return NexusError.from_info(error.info.model_copy(update={"param": f"body.{param}" if param else "body"}))


PREFIX = "/v1/jobs/"


def polled_job_id(path: str) -> str:
    """The id of the job that a GET of `path` is about; empty: it is about something else."""
    rest = path.removeprefix(PREFIX) if path.startswith(PREFIX) else ""
    return "" if "/" in rest else rest


async def shown(jobs: Jobs, record: JobRecord) -> dict[str, Any]:
    """A job as callers see it, with its place and its outlook."""
    position, eta_s = await jobs.outlook(record)
    return shape(record, position=position, eta_s=eta_s)


class JobPollHandler:
    """See the module's docstring."""

    def __init__(self, jobs: Jobs, waiting: Waiting, auth: Auth) -> None:
        self._jobs = jobs
        self._waiting = waiting
        self._auth = auth

    async def serve(self, job_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        """The job; with `?wait=N`, as soon as it has ended, or after so many seconds (at most 300). Never raises, but for cancellation."""
        reply = Reply(send, request_id_of(scope))
        info: ErrorInfo | None = None
        try:
            caller = self._auth.check(scope)
            caller.require(KeyScope.JOBS)
            seconds = _wait_s(scope["query_string"])
            if seconds:
                await self._wait(caller.owner, job_id, seconds, scope, receive)
            record = await self._jobs.get(caller.owner, job_id)
            await reply.whole(200, "application/json", orjson.dumps(await shown(self._jobs, record)))
        except (CallerGone, OSError):
            return
        except Exception as error:
            info = told_as(error, reply.request_id)
        if info is not None and not reply.started:
            await reply.error(info)

    async def _wait(self, owner: str, job_id: str, seconds: float, scope: Scope, receive: Receive) -> None:
        """Until the job has ended, or the time is up, or the gateway shuts down. Raises CallerGone."""
        try:
            await self._waiting.while_there(self._jobs.wait(owner, job_id, seconds), scope, receive)
        except Unavailable:
            if not self._waiting.ending:
                raise


def _wait_s(query: bytes) -> float:
    """Raises InvalidRequest."""
    if not query:
        return 0.0
    text = parse_qs(query.decode("latin-1")).get("wait", ["0"])[-1]
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidRequest(f"'wait' is a number of seconds, not '{text[:50]}'", param="wait")
    return min(seconds, MAX_WAIT_S)
