"""Who is calling. For now one key, the bootstrap admin key; keys with owners and scopes are their own capability."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from schemas.errors import AuthenticationFailed, PermissionDenied
from schemas.keys import ALL_SCOPES, Scope


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller, once known."""

    owner: str
    key_id: str = ""
    """Empty: the bootstrap admin key."""
    name: str = ""
    scopes: frozenset[Scope] = ALL_SCOPES
    max_queued: int | None = None
    max_running: int | None = None
    webhook_secret: str = ""

    def require(self, scope: Scope) -> None:
        """Raises PermissionDenied."""
        if scope not in self.scopes:
            raise PermissionDenied(f"this API key lacks the scope '{scope}'; it has: {', '.join(sorted(self.scopes))}")


ADMIN = Principal(owner="default")


class Auth:
    """Checks keys in constant time."""

    def __init__(self, token: str | None) -> None:
        self._token = token.encode() if token else None

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> Principal:
        """The caller behind `Authorization: Bearer KEY`. Raises AuthenticationFailed, which never repeats the key."""
        if self._token is None:
            raise AuthenticationFailed("this gateway has no key configured: set GATEWAY_BEARER_TOKEN")
        given = b""
        for name, value in headers:
            if name == b"authorization":
                given = value
                break
        scheme, _, key = given.partition(b" ")
        if not key or scheme.lower() != b"bearer":
            raise AuthenticationFailed
        if not hmac.compare_digest(key.strip(), self._token):
            raise AuthenticationFailed("the API key is not valid")
        return ADMIN
