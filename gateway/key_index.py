"""The keys that were created, in memory, found by hash: what a request costs is one SHA-256 and one look."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

from gateway import clock
from gateway.auth import Principal
from schemas.errors import AuthenticationFailed
from schemas.keys import ApiKey


class _Entry(NamedTuple):
    principal: Principal
    expires_at: int | None
    revoked: bool


class KeyIndex:
    """Holds revoked and expired keys too: their callers are told so, and what they left behind still has a secret."""

    def __init__(self, clock: Callable[[], float] = clock.now) -> None:
        self._clock = clock
        self._keys: dict[str, ApiKey] = {}
        self._by_hash: dict[bytes, _Entry] = {}

    def put(self, key: ApiKey) -> None:
        """Enter a key, or replace the one of its id."""
        self._keys[key.id] = key
        principal = Principal(
            owner=key.owner,
            key_id=key.id,
            name=key.name,
            scopes=key.scopes,
            max_queued=key.max_queued,
            max_running=key.max_running,
            webhook_secret=key.webhook_secret,
        )
        self._by_hash[bytes.fromhex(key.hash)] = _Entry(principal, key.expires_at, key.revoked_at is not None)

    def drop(self, key_id: str) -> None:
        """Forget a key."""
        key = self._keys.pop(key_id, None)
        if key is not None:
            self._by_hash.pop(bytes.fromhex(key.hash), None)

    def get(self, key_id: str) -> ApiKey | None:
        """The key of this id, also when it is revoked or has expired."""
        return self._keys.get(key_id)

    def all(self) -> list[ApiKey]:
        """Every key, revoked ones too, the newest first."""
        return sorted(self._keys.values(), key=lambda key: key.id, reverse=True)

    def find(self, key: bytes) -> Principal | None:
        """Whose key this is; None: nobody's. Raises AuthenticationFailed for one that is revoked or has expired."""
        entry = self._by_hash.get(hashlib.sha256(key).digest())
        if entry is None:
            return None
        if entry.revoked:
            raise AuthenticationFailed("this API key was revoked")
        if entry.expires_at is not None and entry.expires_at <= self._clock():
            raise AuthenticationFailed("this API key has expired")
        return entry.principal
