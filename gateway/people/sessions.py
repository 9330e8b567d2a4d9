"""Store the sessions of people who have signed in.

Guarantees:
- A cookie holds 256 random bits; the store holds their SHA-256, and no caller can choose them.
- A session ends after `idle_s` without a request, and `longest_s` after it began; of one person or key, the oldest end when there
  are more than `MAX_SESSIONS`.
- An ended session never comes back: only `begin` adds one, and its use is written with a comparison.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, ValidationError

from backbone.store.documents import DocumentStore
from gateway import clock

KIND = "session"
INDEX_KIND = "session-of"
MAX_SESSIONS = 10
"""Sessions of one person, or of one API key."""
SEEN_INTERVAL_S = 60.0
"""Longest time between two notes of a session's use."""
SECRET_CHARS = 43


class Session(BaseModel):
    """A session. It belongs to a person, or to the API key that it began with."""

    model_config = ConfigDict(frozen=True)

    id: str
    """`session_…`; not secret. Ids sort by the time at which sessions began."""
    person: str = ""
    """Id of the person; empty: the session belongs to a key."""
    key: str = ""
    """Fingerprint of the key, in hex."""
    began_at: float
    """Unix seconds."""
    seen_at: float
    """The last use, in Unix seconds, up to `SEEN_INTERVAL_S` late."""

    @property
    def holder(self) -> str:
        """The person or the key, as the owner of the session's entry in the index."""
        return self.person or f"key:{self.key}"


class SessionStore:
    """Begins, finds and ends sessions. Every method raises Unavailable while the store is unavailable."""

    def __init__(
        self, documents: DocumentStore, *, idle_s: float, longest_s: float, clock: Callable[[], float] = clock.now
    ) -> None:
        self._documents = documents
        self._idle_s = idle_s
        self.longest_s = longest_s
        self._clock = clock

    async def begin(self, *, person: str = "", key: bytes = b"") -> str:
        """Begin a session of a person, or of the key with this fingerprint. Returns the secret for the cookie."""
        secret, now = secrets.token_urlsafe(32), self._clock()
        session_id = f"session_{int(1e6 * now):014x}{secrets.token_hex(8)}"
        session = Session(id=session_id, person=person, key=key.hex(), began_at=now, seen_at=now)
        digest = _digest(secret)
        # The index comes first: a session that is not in it would not be bounded.
        await self._documents.put(INDEX_KIND, session.holder, session.id, digest.encode(), ttl_s=self.longest_s)
        await self._documents.put(KIND, "", digest, session.model_dump_json().encode(), ttl_s=self.longest_s)
        await self._end_excess(session.holder)
        return secret

    async def find(self, secret: str) -> Session | None:
        """Return a session that has not ended, and note its use."""
        if len(secret) != SECRET_CHARS or not secret.isascii():
            return None
        digest, now = _digest(secret), self._clock()
        raw = await self._documents.get(KIND, "", digest)
        session = _parse(raw) if raw is not None else None
        if raw is None or session is None:
            return None
        if now - session.seen_at >= self._idle_s or now - session.began_at >= self.longest_s:
            await self._remove(digest, session)
            return None
        if now - session.seen_at >= min(SEEN_INTERVAL_S, self._idle_s / 10):
            used = session.model_copy(update={"seen_at": now})
            await self._documents.swap(KIND, "", digest, raw, used.model_dump_json().encode())
        return session

    async def is_open(self, secret: str) -> bool:
        """Return whether a session was neither ended nor has reached its longest time. An open call keeps it from being idle."""
        raw = await self._documents.get(KIND, "", _digest(secret))
        session = _parse(raw) if raw is not None else None
        return session is not None and self._clock() - session.began_at < self.longest_s

    async def end(self, secret: str) -> None:
        """End a session, if it exists."""
        digest = _digest(secret)
        raw = await self._documents.get(KIND, "", digest)
        session = _parse(raw) if raw is not None else None
        if session is not None:
            await self._remove(digest, session)

    async def end_all(self, person: str) -> None:
        """End all sessions of a person."""
        await self._end_excess(person, most=0)

    async def count(self, person: str) -> int:
        """Return how many sessions a person has, idle ones included."""
        return len(await self._documents.page(INDEX_KIND, person, limit=MAX_SESSIONS))

    async def _end_excess(self, holder: str, most: int = MAX_SESSIONS) -> None:
        """End the oldest sessions beyond `most`."""
        found = await self._documents.page(INDEX_KIND, holder, limit=2 * MAX_SESSIONS + most)
        await asyncio.gather(*(self._forget(holder, session_id, raw.decode()) for session_id, raw in found[most:]))

    async def _remove(self, digest: str, session: Session) -> None:
        await self._forget(session.holder, session.id, digest)

    async def _forget(self, holder: str, session_id: str, digest: str) -> None:
        await self._documents.remove(KIND, "", digest)
        await self._documents.remove(INDEX_KIND, holder, session_id)


def csrf_token(secret: str) -> str:
    """Return the token that unsafe requests of a session must repeat. It does not reveal the cookie."""
    digest = hmac.new(secret.encode(), b"nexus csrf", hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _parse(raw: bytes) -> Session | None:
    try:
        return Session.model_validate_json(raw)
    except ValidationError:
        return None
