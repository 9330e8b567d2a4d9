"""Find the principal behind a session's cookie, before a route or a handler authenticates the caller."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog

from gateway.auth.authenticator import Authenticator, Principal
from gateway.auth.key_store import KeyStore
from gateway.http.asgi import EXCHANGE, SESSION, HttpExchange, Scope
from gateway.people.browser import SAFE_METHODS, Cookie, Origin, header
from gateway.people.sessions import Session, SessionStore, csrf_token
from schemas.errors import AuthenticationFailed, NexusError, PermissionDenied, Unavailable
from schemas.people import Role

log = structlog.get_logger(__name__)

CHECK_INTERVAL_S = 1.0
"""Seconds between two checks whether the sessions of open calls have ended."""
MAX_CHECKS = 64
"""Sessions that are checked at the same time."""
API = "/v1/"
PATHS = (API, "/auth/")
CSRF_HEADER = b"x-csrf-token"
ENDED = "Your session has ended. Sign in again at /auth/login."


class CsrfTokenMissing(PermissionDenied):
    """The header `x-csrf-token` is missing or wrong."""

    code = "csrf_token_invalid"


class SessionGate:
    """Turns the cookie of a request into its caller, at `scope[SESSION]`."""

    def __init__(self, sessions: SessionStore, keys: KeyStore, auth: Authenticator, origin: Origin) -> None:
        self._sessions = sessions
        self._keys = keys
        self._auth = auth
        self._origin = origin
        self._calls: dict[str, set[HttpExchange]] = {}
        """The open calls of each session, by the cookie's value."""
        self._watcher: asyncio.Task[None] | None = None
        self.cookie = Cookie("nexus-session", sessions.longest_s)

    async def start(self) -> None:
        """Start to end the calls of sessions that end."""
        self._watcher = asyncio.create_task(self._watch(), name="sessions")

    async def close(self) -> None:
        """Stop that."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    @contextmanager
    def open_call(self, scope: Scope) -> Iterator[None]:
        """End the call of an entered request within the block when its session ends, whatever ends it, at any gateway."""
        exchange: HttpExchange | None = scope.get(EXCHANGE)
        secret = self.secret(scope) if isinstance(scope.get(SESSION), Principal) else ""
        if not secret or exchange is None or not scope["path"].startswith(API):
            yield
            return
        calls = self._calls.setdefault(secret, set())
        calls.add(exchange)
        try:
            yield
        finally:
            calls.discard(exchange)
            if not calls:
                self._calls.pop(secret, None)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            try:
                await self.end_calls()
            except Exception:
                log.exception("sessions.watch_failed")

    async def end_calls(self) -> None:
        """End the open calls of sessions that have ended. While Redis is away, none ends."""
        slots = asyncio.Semaphore(MAX_CHECKS)

        async def check(secret: str) -> None:
            async with slots:
                if await self._sessions.is_open(secret):
                    return
            for exchange in list(self._calls.get(secret, ())):
                exchange.end_call(AuthenticationFailed(ENDED))

        with suppress(Unavailable):
            await asyncio.gather(*(check(secret) for secret in list(self._calls)))

    async def enter(self, scope: Scope) -> None:
        """Set `scope[SESSION]` to the caller, or to the error that refuses it, if the request has a session's cookie."""
        if not scope["path"].startswith(PATHS):
            return
        secret = self.secret(scope)
        if not secret:
            return
        try:
            scope[SESSION] = await self._admit(scope, secret)
        except NexusError as error:
            scope[SESSION] = error

    def secret(self, scope: Scope) -> str:
        """Return the value of the request's cookie; empty: it has none."""
        return self.cookie.read(scope["headers"], secure=self._origin.is_secure(scope))

    async def _admit(self, scope: Scope, secret: str) -> Principal:
        session = await self._sessions.find(secret)
        principal = None if session is None else self._principal(session)
        if principal is None:
            raise AuthenticationFailed(ENDED)
        if scope["method"] not in SAFE_METHODS:
            self._origin.require_same(scope)
            given = header(scope["headers"], CSRF_HEADER)
            if not hmac.compare_digest(given.encode(), csrf_token(secret).encode()):
                raise CsrfTokenMissing(
                    "The header 'x-csrf-token' is missing or wrong. GET /auth/session returns the token as 'csrf_token'."
                )
            if principal.role is Role.VIEWER and not scope["path"].startswith("/auth/"):
                raise PermissionDenied("Your role 'viewer' can only read. An administrator can change your role.")
        return principal

    def _principal(self, session: Session) -> Principal | None:
        """Return the caller. Raises AuthenticationFailed if the session's key has ended."""
        if session.person:
            return self._keys.signed_in(session.person, session.began_at)
        return self._auth.find_fingerprint(bytes.fromhex(session.key))
