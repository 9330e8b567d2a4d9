"""Authenticate callers by their API key: the bootstrap key, or a key that an operator created."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from gateway.auth.guess_limiter import KeyGuessLimiter, TooManyWrongKeys
from gateway.http.asgi import CALLER_INFO, RATE_HEADERS, SESSION, Caller, Headers
from gateway.http.asgi import Scope as HttpScope
from gateway.limits.effective import NO_LIMITS, EffectiveLimits
from schemas.errors import AuthenticationFailed, NexusError, PermissionDenied
from schemas.keys import ADMIN_SCOPES, ALL_SCOPES, Scope, granted
from schemas.people import Role

BOOTSTRAP_OWNER = "default"
PREFIX = "nexus-"
"""Prefix of created keys."""
LENGTH = len(PREFIX) + 43
NO_KEYS = "This gateway has no API key. Its operator must set GATEWAY_BEARER_TOKEN."
UNKNOWN_KEY = (
    "The API key is not valid: this gateway has no such key. "
    "Check that it is copied whole, or ask the operator of this gateway for one."
)


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller, with its rights and limits."""

    owner: str
    key_id: str = ""
    """Id of a created key, or of the person who signed in; empty for the bootstrap key."""
    name: str = ""
    scopes: frozenset[Scope] = granted(ALL_SCOPES)
    """The key's scopes, with those that they include."""
    limits: EffectiveLimits = NO_LIMITS
    webhook_secret: str = ""
    person: str = ""
    """Id of the person who signed in, or who made the key; empty: nobody in particular."""
    role: Role | None = None
    """The role of the person who signed in; None for a key."""

    def require(self, scope: Scope) -> None:
        """Raise PermissionDenied unless the key or the person's role has `scope`."""
        if scope not in self.scopes:
            if self.role is not None:
                raise PermissionDenied(
                    f"Your role '{self.role}' lacks the scope '{scope}'. An administrator can change your role."
                )
            raise PermissionDenied(f"This API key lacks the scope '{scope}'. It has: {', '.join(sorted(self.scopes))}.")

    def require_power_over(self, scopes: frozenset[Scope]) -> None:
        """Raise PermissionDenied unless the key has every administrative scope among `scopes`: no key makes a more powerful one."""
        lacking = (granted(scopes) & (ADMIN_SCOPES | {Scope.ADMIN})) - self.scopes
        if lacking:
            raise PermissionDenied(
                f"The scope '{min(lacking)}' is missing, which is needed to manage what has it.", param="scopes"
            )


class KeyEnded(AuthenticationFailed):
    """The API key was valid, and is no longer."""

    def __init__(self, message: str, principal: Principal) -> None:
        super().__init__(message)
        self.principal = principal
        """Whose key it was."""


class KeyLookup(Protocol):
    """Looks created keys up in memory, without waiting."""

    @property
    def is_empty(self) -> bool:
        """Whether the keys were read and there are none."""

    def find(self, key: bytes) -> Principal:
        """Return the principal of a key. Raises AuthenticationFailed; Unavailable while the keys have never been read."""

    def find_hash(self, digest: bytes) -> Principal:
        """Return the principal of the key with this SHA-256. Raises as `find` does."""

    def webhook_secret(self, key_id: str) -> str | None:
        """Return the secret that signs the webhooks of a key's jobs, also of a revoked key; None for an unknown key."""


class Authenticator:
    """Authenticates requests: compares the bootstrap key in constant time, and looks up created keys by their hash."""

    def __init__(
        self,
        token: str | None,
        keys: KeyLookup | None = None,
        guess_limiter: KeyGuessLimiter | None = None,
        rate_headers: Callable[[EffectiveLimits], Headers] | None = None,
    ) -> None:
        self._token = token.encode() if token else None
        self._keys = keys
        self._guess_limiter = guess_limiter
        self._rate_headers = rate_headers
        self.on_refused: Callable[[HttpScope, NexusError, Principal | None], None] = lambda *_: None
        """Receives each refusal, with the principal of a key that is known but may not be used."""
        secret = bootstrap_webhook_secret(token) if token else ""
        self._bootstrap = Principal(owner=BOOTSTRAP_OWNER, webhook_secret=secret)

    def authenticate(self, scope: HttpScope) -> Principal:
        """Return the caller whose key the header `Authorization: Bearer KEY` holds, or who has signed in: a key wins.

        Raises AuthenticationFailed, whose message never repeats the key; TooManyWrongKeys for an address that tries out keys;
        Unavailable while the created keys have never been read.
        """
        principal: Principal | None = None
        try:
            try:
                key = read_key(scope["headers"])
            except AuthenticationFailed:
                self._require_keys()
                raise
            if not key:
                return self._signed_in(scope)
            caller: Caller | None = scope.get(CALLER_INFO)
            guess_limiter = self._guess_limiter
            if caller is None or guess_limiter is None:
                principal = self._find(key)
                if principal.limits.networks:
                    principal.limits.require_network(caller.address if caller is not None else "")
                return principal
            try:
                principal = self._find(key)
            except AuthenticationFailed:
                guess_limiter.record_wrong_key(caller.address, key)
                raise
            if not principal.key_id:
                guess_limiter.record_bootstrap_use(caller.address)
            if principal.limits.networks:
                principal.limits.require_network(caller.address)
        except (AuthenticationFailed, PermissionDenied, TooManyWrongKeys) as error:
            self.on_refused(scope, error, error.principal if isinstance(error, KeyEnded) else principal)
            raise
        if principal.limits.is_rated and self._rate_headers is not None:
            scope[RATE_HEADERS] = partial(self._rate_headers, principal.limits)
        caller.owner, caller.key_id = principal.owner, principal.key_id
        return principal

    def _signed_in(self, scope: HttpScope) -> Principal:
        """Return the caller of a request without a key, by its session. Raises as `authenticate` does."""
        found: Principal | NexusError | None = scope.get(SESSION)
        if found is None:
            self._require_keys()
            raise AuthenticationFailed
        if isinstance(found, NexusError):
            raise found
        caller: Caller | None = scope.get(CALLER_INFO)
        if found.limits.networks:
            found.limits.require_network(caller.address if caller is not None else "")
        if found.limits.is_rated and self._rate_headers is not None:
            scope[RATE_HEADERS] = partial(self._rate_headers, found.limits)
        if caller is not None:
            caller.owner, caller.key_id = found.owner, found.key_id
        return found

    def _find(self, key: bytes) -> Principal:
        if self._token is not None and hmac.compare_digest(key, self._token):
            return self._bootstrap
        self._require_keys()
        if self._keys is None:
            raise AuthenticationFailed(UNKNOWN_KEY)
        return self._keys.find(key)

    def _require_keys(self) -> None:
        """Raise AuthenticationFailed if no key can be right."""
        if self._token is None and (self._keys is None or self._keys.is_empty):
            raise AuthenticationFailed(NO_KEYS)

    def record_wrong_secret(self, scope: HttpScope, secret: bytes) -> None:
        """Count a wrong secret of a sign-in as a wrong key. Raises TooManyWrongKeys."""
        caller: Caller | None = scope.get(CALLER_INFO)
        if caller is not None and self._guess_limiter is not None:
            self._guess_limiter.record_wrong_key(caller.address, secret)

    def fingerprint(self, key: bytes) -> bytes:
        """Return what a session stores of the key that it began with."""
        if self._token is not None and hmac.compare_digest(key, self._token):
            return _bootstrap_fingerprint(self._token)
        return hashlib.sha256(key).digest()

    def find_fingerprint(self, fingerprint: bytes) -> Principal:
        """Return the principal of the key with this fingerprint. Raises as `authenticate` does."""
        if self._token is not None and hmac.compare_digest(fingerprint, _bootstrap_fingerprint(self._token)):
            return self._bootstrap
        if self._keys is None:
            raise AuthenticationFailed(UNKNOWN_KEY)
        return self._keys.find_hash(fingerprint)

    def webhook_secret(self, key_id: str) -> str | None:
        """Return the secret that signs the webhooks of a key's or person's jobs; None for one that is not known."""
        if not key_id:
            return self._bootstrap.webhook_secret or None
        return self._keys.webhook_secret(key_id) if self._keys is not None else None


def read_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a request's key; empty: it has none. Raises AuthenticationFailed for another kind of authorization."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            key = key.strip()
            if not key or scheme.lower() != b"bearer":
                raise AuthenticationFailed
            return key
    return b""


def add_caller(fields: dict[str, Any], principal: Principal | None, caller: Caller | None) -> None:
    """Add who sent a request to the fields of its line in the log. None: nobody whose key is valid; a connection that is not known."""
    if caller is not None:
        fields["client"] = caller.address
    if principal is not None:
        fields["team"] = principal.owner
        fields["key"] = principal.key_id


def caller_fields(principal: Principal | None, caller: Caller | None) -> dict[str, Any]:
    """Return the fields of `add_caller`."""
    fields: dict[str, Any] = {}
    add_caller(fields, principal, caller)
    return fields


def is_created(key: bytes) -> bool:
    """Return whether `key` has the form of a created key: `nexus-` and 256 bits in base64url."""
    return len(key) == LENGTH and key.startswith(PREFIX.encode())


def _bootstrap_fingerprint(token: bytes) -> bytes:
    return hmac.new(token, b"nexus session", hashlib.sha256).digest()


def bootstrap_webhook_secret(token: str) -> str:
    """Derive the webhook secret of the bootstrap key. Every gateway derives the same, and it does not reveal the key."""
    digest = hmac.new(token.encode(), b"nexus webhook secret", hashlib.sha256).digest()
    return "whsec_" + base64.b64encode(digest).decode()
