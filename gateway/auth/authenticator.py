"""Who is calling: the bootstrap key, or one of the keys that were created."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from gateway.auth.guess_limiter import KeyGuessLimiter
from gateway.http.asgi import CALLER_INFO, Caller
from gateway.http.asgi import Scope as HttpScope
from schemas.errors import AuthenticationFailed, PermissionDenied, RateLimited
from schemas.keys import ALL_SCOPES, Scope

BOOTSTRAP_OWNER = "default"
PREFIX = "nexus-"
"""Of keys that are created."""
LENGTH = len(PREFIX) + 43
UNKNOWN_KEY = (
    "The API key is not valid: this gateway has no such key. "
    "Check that it is copied whole, or ask the operator of this gateway for one."
)


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


class KeyLookup(Protocol):
    """The keys that were created, as far as they are known here. Nothing waits."""

    @property
    def is_empty(self) -> bool:
        """It is known that there is none."""

    def find(self, key: bytes) -> Principal:
        """Whose key this is. Raises AuthenticationFailed, and Unavailable while that cannot be known."""

    def webhook_secret(self, key_id: str) -> str | None:
        """What the webhooks of a key's jobs are signed with, also after its end; None: there is no such key."""


class Authenticator:
    """Checks keys: the bootstrap key in constant time, all others by their hash. Waits for nothing."""

    def __init__(
        self, token: str | None, keys: KeyLookup | None = None, guesses: KeyGuessLimiter | None = None
    ) -> None:
        self._token = token.encode() if token else None
        self._keys = keys
        self._guesses = guesses
        secret = bootstrap_webhook_secret(token) if token else ""
        self._bootstrap = Principal(owner=BOOTSTRAP_OWNER, webhook_secret=secret)

    def authenticate(self, scope: HttpScope) -> Principal:
        """Return the caller behind `Authorization: Bearer KEY`.

        Raises AuthenticationFailed, which never repeats the key; TooManyWrongKeys for an address that tries out keys; Unavailable
        while keys that were created have never been read.
        """
        key = self._key(scope["headers"])
        caller: Caller | None = scope.get(CALLER_INFO)
        guesses = self._guesses
        if caller is None or guesses is None:
            return self._find(key)
        try:
            principal = self._find(key)
        except AuthenticationFailed:
            guesses.wrong(caller.address, key)
            raise
        if not principal.key_id:
            guesses.bootstrap(caller.address)
        caller.owner = principal.owner
        return principal

    def _key(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        if self._token is None and (self._keys is None or self._keys.is_empty):
            raise AuthenticationFailed("this gateway has no key configured: set GATEWAY_BEARER_TOKEN")
        given = b""
        for name, value in headers:
            if name == b"authorization":
                given = value
                break
        scheme, _, key = given.partition(b" ")
        key = key.strip()
        if not key or scheme.lower() != b"bearer":
            raise AuthenticationFailed
        return key

    def _find(self, key: bytes) -> Principal:
        if self._token is not None and hmac.compare_digest(key, self._token):
            return self._bootstrap
        if self._keys is None:
            raise AuthenticationFailed(UNKNOWN_KEY)
        return self._keys.find(key)

    def webhook_secret(self, key_id: str) -> str | None:
        """What the webhooks of a key's jobs are signed with; None: there is no such key, or it is not known now."""
        if not key_id:
            return self._bootstrap.webhook_secret or None
        return self._keys.webhook_secret(key_id) if self._keys is not None else None


def is_created(key: bytes) -> bool:
    """Whether this looks like a key that was created: `nexus-` and 256 bits in base64url."""
    return len(key) == LENGTH and key.startswith(PREFIX.encode())


def bootstrap_webhook_secret(token: str) -> str:
    """The bootstrap key's: made from the key, so that every gateway has the same, and useless for finding the key."""
    digest = hmac.new(token.encode(), b"nexus webhook secret", hashlib.sha256).digest()
    return "whsec_" + base64.b64encode(digest).decode()


class ConcurrencyLimiter:
    """Counts nothing for keys without limits: a key is bounded where it has both a `max_queued` and a `max_running`."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def acquire(self, principal: Principal) -> Principal | None:
        """One more. Returns what `leave` must be given when it has ended; None: it is not counted. Raises RateLimited."""
        if principal.max_queued is None or principal.max_running is None:
            return None
        most = principal.max_queued + principal.max_running
        if self._open[principal.key_id] >= most:
            raise RateLimited(
                f"this API key has {most} requests open, as many as it may have; try again when one ended"
            )
        self._open[principal.key_id] += 1
        return principal

    def release(self, principal: Principal) -> None:
        """One less."""
        left = self._open[principal.key_id] - 1
        if left > 0:
            self._open[principal.key_id] = left
        else:
            del self._open[principal.key_id]
