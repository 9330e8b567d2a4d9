"""The outermost ASGI application: it adds request ids and CORS headers, serves the hot routes, and passes others to FastAPI.

It is pure ASGI because Starlette's `BaseHTTPMiddleware` hides that the caller has disconnected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import structlog

from backbone.ids import new_request_id
from gateway.http.asgi import (
    CLOSING_STATUSES,
    COMMON_HEADERS,
    CONNECTION_CLOSE,
    HOPS,
    NO_STORE,
    RATE_HEADERS,
    REQUEST_ID,
    Headers,
    Receive,
    Reply,
    Scope,
    Send,
)
from gateway.http.preferences import NAMES as PREFERENCES
from gateway.jobs.http_handler import PATH as SUBMIT
from gateway.jobs.http_handler import DurableRequestHandler, JobPollHandler, polled_job_id
from gateway.people.session_gate import SessionGate
from gateway.sync.handler import InferenceHandler
from schemas.endpoints import EndpointSpec
from schemas.errors import InternalError, RequestLoop
from schemas.hops import HOPS_HEADER, parse_hops

log = structlog.get_logger(__name__)

App = Callable[[Scope, Receive, Send], Awaitable[None]]

ALLOWED_METHODS = b"GET, POST, PUT, PATCH, DELETE, OPTIONS"
HOPS_NAME = HOPS_HEADER.encode()
UNCOMMON_HEADERS = PREFERENCES | {HOPS_NAME, b"origin", b"content-encoding", b"transfer-encoding", b"expect"}
"""Headers of requests that `begin` leaves to a call of the application."""
LINGER_S = 1.0
"""Delay before a connection closes under a caller that still sends its body: an immediate reset could destroy the answer."""
EXPOSED_HEADERS = (
    b"x-request-id, request-id, x-nexus-job-id, x-nexus-adapted, x-nexus-inspected, x-nexus-token-count, retry-after, x-should-retry, "
    b"location, preference-applied, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


class AsgiApp:
    """Dispatches requests to the hot handlers and to FastAPI."""

    def __init__(
        self,
        app: App,
        inference: InferenceHandler,
        endpoints: Iterable[EndpointSpec],
        origins: str,
        durable_handler: DurableRequestHandler | None = None,
        polls: JobPollHandler | None = None,
        methods: Callable[[str], bytes] = lambda _path: b"",
        max_hops: int = 0,
        sessions: SessionGate | None = None,
        on_denied: Callable[[Scope, bytes], None] | None = None,
    ) -> None:
        """`on_denied` receives each answer 403, without waiting. `sessions`: finds the callers of requests that have a session's cookie in place of a key. `max_hops`: how many gateways a request may have passed. `methods`: returns the `Allow` header of a path, empty if
        nothing is served there.
        """
        self._app = app
        self._inference = inference
        self._durable_handler = durable_handler
        self._polls = polls
        self._methods = methods
        self._hot = {endpoint.path: endpoint for endpoint in endpoints}
        self._max_hops = max_hops
        self._sessions = sessions
        self._on_denied = on_denied
        self._any_origin = origins.strip() == "*"
        self._origins = frozenset(o.strip().encode() for o in origins.split(",") if o.strip())

    def begin(self, scope: Scope, body: bytes) -> bool:
        """Begin a common inference request, whose body has arrived, without a task.

        Returns False if the application must be called; it continues from where this ended.
        """
        endpoint = self._hot.get(scope["path"])
        if endpoint is None or scope["method"] != "POST":
            return False
        headers = dict(scope["headers"])
        if b"authorization" not in headers or not UNCOMMON_HEADERS.isdisjoint(headers):
            return False
        self._identify(scope, None)
        return self._inference.begin(endpoint, scope, body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        origin, hops, has_session = _uncommon_headers(scope["headers"])
        self._identify(scope, origin)
        if not has_session or self._sessions is None:
            await self._serve(scope, receive, send, hops)
            return
        await self._sessions.enter(scope)
        with self._sessions.open_call(scope):
            await self._serve(scope, receive, send, hops)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, hops: bytes | None) -> None:
        request_id, common = scope[REQUEST_ID], scope[COMMON_HEADERS]
        started = closing = denied = False

        async def reply(message: MutableMapping[str, Any]) -> None:
            nonlocal started, closing, denied
            if message["type"] == "http.response.start":
                started = True
                status, headers = message["status"], message.get("headers", ())
                closing = status in CLOSING_STATUSES or (status == 503 and CONNECTION_CLOSE in headers)
                denied = status == 403 and self._on_denied is not None
                rate_headers = scope.get(RATE_HEADERS)
                message["headers"] = [*headers, *common, *(rate_headers() if rate_headers is not None else ())]
            elif denied and self._on_denied is not None:
                denied = False
                self._on_denied(scope, message.get("body", b""))
            elif closing:
                message["more_body"] = True
            await send(message)

        endpoint = self._hot.get(scope["path"])
        if hops is not None and not self._passes(scope, hops):
            await Reply(reply, request_id).send_error(RequestLoop().info)
        elif endpoint is not None and scope["method"] == "POST":
            await self._inference.serve(endpoint, scope, receive, reply)
        elif self._durable_handler is not None and scope["path"] == SUBMIT and scope["method"] == "POST":
            await self._durable_handler.serve(scope, receive, reply)
        elif self._polls is not None and scope["method"] in {"GET", "HEAD"} and (job := polled_job_id(scope["path"])):
            await self._polls.serve(job, scope, receive, reply)
        elif scope["method"] == "OPTIONS":
            await self._preflight(scope, Reply(reply, request_id))
        else:
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}  # the server omits the body

            async def keep_out_of_caches(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    headers = message.get("headers", ())
                    if not any(name == b"cache-control" for name, _ in headers):
                        message["headers"] = [*headers, NO_STORE]
                await reply(message)

            try:
                await self._app(scope, receive, keep_out_of_caches)
            except Exception:
                log.exception("request.route_crashed", request_id=request_id, path=scope["path"])
                if not started:
                    await Reply(reply, request_id).send_error(
                        InternalError(f"internal error; request id {request_id}").info
                    )
        if closing:
            await asyncio.sleep(LINGER_S)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _identify(self, scope: Scope, origin: bytes | None) -> None:
        """Give the request its id, and the headers that every answer to it has, unless `begin` has done so."""
        if REQUEST_ID in scope:
            return
        request_id = scope[REQUEST_ID] = new_request_id()
        scope[COMMON_HEADERS] = [(b"x-request-id", request_id.encode()), *self._cors(origin)]

    def _passes(self, scope: Scope, value: bytes) -> bool:
        """Note how many gateways the request has passed, and return whether that is within the limit."""
        hops = scope[HOPS] = parse_hops(value)
        return hops <= self._max_hops

    def _cors(self, origin: bytes | None) -> Headers:
        if origin is None:
            return []
        if self._any_origin:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED_HEADERS)]
        if origin in self._origins:
            return [
                (b"access-control-allow-origin", origin),
                (b"vary", b"origin"),
                (b"access-control-expose-headers", EXPOSED_HEADERS),
            ]
        return []

    async def _preflight(self, scope: Scope, reply: Reply) -> None:
        """Answer a CORS preflight: browsers send it without a key, and name the headers they will send."""
        wanted = next(
            (v for n, v in scope["headers"] if n == b"access-control-request-headers"), b"authorization, content-type"
        )
        headers = [
            (b"access-control-allow-methods", ALLOWED_METHODS),
            (b"access-control-allow-headers", wanted),
            (b"access-control-max-age", b"86400"),
            (b"allow", self._methods(scope["path"]) or ALLOWED_METHODS),
        ]
        await reply.send_head(204, headers)
        await reply.send_end()


def _uncommon_headers(headers: Headers) -> tuple[bytes | None, bytes | None, bool]:
    """Return the `Origin` and hops headers, and whether a cookie stands in place of a key. One pass, since every request pays for it."""
    origin = hops = None
    has_cookie = has_key = False
    for name, value in headers:
        if name == b"origin":
            origin = value
        elif name == HOPS_NAME:
            hops = value
        elif name == b"authorization":
            has_key = True
        elif name == b"cookie":
            has_cookie = True
    return origin, hops, has_cookie and not has_key
