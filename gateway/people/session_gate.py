"""Find the principal behind a session's cookie, before a route or a handler authenticates the caller."""

from __future__ import annotations

import hmac

from gateway.auth.authenticator import Authenticator, Principal
from gateway.auth.key_store import KeyStore
from gateway.http.asgi import SESSION, Scope
from gateway.people.browser import SAFE_METHODS, Cookie, Origin, header
from gateway.people.sessions import Session, SessionStore, csrf_token
from schemas.errors import AuthenticationFailed, NexusError, PermissionDenied
from schemas.people import Role

PATHS = ("/v1/", "/auth/")
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
        self.cookie = Cookie("nexus-session", sessions.longest_s)

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
