"""Record the requests that pull, load and unload models, which the handler of inference serves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import Response

from gateway.audit.actions import ENDPOINT_ACTIONS
from gateway.audit.audit_log import AuditLog
from gateway.audit.entry import AuditEntry
from gateway.auth.authenticator import Authenticator
from gateway.http.asgi import EXCHANGE, Receive, Reply, Scope, Send
from schemas.endpoints import EndpointSpec
from schemas.errors import NexusError

Serve = Callable[[EndpointSpec, Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 64 * 1024
"""Bytes of a request in which the model's name is looked for."""
CLIENT_CLOSED = 499
"""The status where the caller disconnected before the answer."""
JOB_HEADER = b"x-nexus-job-id"


class AuditedModelJobs:
    """Serves the endpoints that need an administrative scope, and records each call."""

    def __init__(self, log: AuditLog, auth: Authenticator, serve: Serve) -> None:
        """`serve`: answers a request, and raises nothing but CancelledError."""
        self._log = log
        self._auth = auth
        self._serve = serve

    def route(self, endpoint: EndpointSpec) -> Callable[[Request], Awaitable[Response]]:
        """Return the function of an endpoint's route in FastAPI."""

        async def serve_model_job(_request: Request) -> Response:
            return _ModelJobReply(self, endpoint)

        return serve_model_job

    async def serve(self, endpoint: EndpointSpec, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises nothing but CancelledError."""
        entry = self._log.open(ENDPOINT_ACTIONS[endpoint.path], scope, reads=False)
        try:
            principal = self._auth.authenticate(scope)
            entry.identify(principal)
            principal.require(endpoint.scope)
        except NexusError as error:
            await Reply.to(scope, send).send_error(error.info)
            entry.end(error.info.status, error.info.code or error.info.type)
            return
        entry.allow()
        call = _RecordedCall(entry, receive, send)
        # Without the server's shortcuts for answers, all of them pass `send`.
        watched = {name: value for name, value in scope.items() if name != EXCHANGE}
        try:
            await self._serve(endpoint, watched, call.receive, call.send)
        finally:
            call.end(CLIENT_CLOSED)


class _ModelJobReply(Response):
    """Answers a request outside of FastAPI."""

    def __init__(self, jobs: AuditedModelJobs, endpoint: EndpointSpec) -> None:
        super().__init__()
        self._jobs = jobs
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._jobs.serve(self._endpoint, scope, receive, send)


class _RecordedCall:
    """Reads the model's name from the request, and the result from the answer. Ends the entry before the answer ends."""

    def __init__(self, entry: AuditEntry, receive: Receive, send: Send) -> None:
        self._entry = entry
        self._receive = receive
        self._send = send
        self._body = b""
        self._status = 0
        self._has_ended = False

    async def receive(self) -> MutableMapping[str, Any]:
        """Receive a message of the server."""
        message = await self._receive()
        if message["type"] == "http.request" and len(self._body) <= MAX_BODY:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                self._entry.target = _text_in(self._body, "model")
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a message to the server."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            if job := dict(message.get("headers", ())).get(JOB_HEADER):
                self._entry.details["job"] = job.decode()
        elif not message.get("more_body", False):
            self.end(self._status, message.get("body", b""))
        await self._send(message)

    def end(self, status: int, answer: bytes = b"") -> None:
        """End the entry, if it has not ended."""
        if not self._has_ended:
            self._has_ended = True
            self._entry.end(status, _text_in(answer, "error", "code") if status >= 400 else "")


def _text_in(body: bytes, *path: str) -> str:
    """Return the text at a path of JSON objects; empty if there is none."""
    try:
        value = orjson.loads(body)
    except ValueError:
        return ""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""
