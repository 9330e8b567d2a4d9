"""The keys that were created: kept in the store, known to every gateway.

Guarantees:
- A key itself is kept nowhere: `create` shows it once, the store has its SHA-256.
- A request never waits for the store: `find` looks into memory, where every key is, and checks revocation and expiry.
- A change is in force here at once, at other gateways when they hear the notice (milliseconds), and where the notice is lost
  with the next reading: every two seconds, and beyond a thousand keys every two for each thousand. The store must be
  reachable from there.
- While the store is away, the keys that are known go on working, and nothing can be changed. A gateway that has never
  read the keys cannot tell a good one from a bad one: what looks like one of ours is then 503, to be tried again, not 401.
- A store that has lost its data gets the keys back from any gateway that knew them. A revoked key never comes back:
  it stays in the store, marked, for `KEPT_S`; a gateway that knows of a revocation repeats it where the store does not; and
  one that has not read the store for `TRUSTED_S` forgets what the store does not have.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterable
from typing import NamedTuple

import structlog
from pydantic import ValidationError

from backbone.bus.broadcast import Broadcast
from backbone.ids import new_id
from backbone.store.documents import DocumentStore
from gateway import clock
from gateway.auth.authenticator import BOOTSTRAP_OWNER, PREFIX, UNKNOWN_KEY, Principal, is_created
from schemas.errors import AuthenticationFailed, InvalidRequest, NexusError, NotFound, Unavailable
from schemas.keys import ApiKey, Scope

log = structlog.get_logger(__name__)

KIND = "key"
TOPIC = "keys"
"""Of the notice that they have changed."""
REREAD_S = 2.0
"""For each thousand keys, whose reading takes 8 ms of the gateway's time."""
KEPT_S = 14 * 86_400.0
"""How long a key is remembered after its end: longer than any job lives and any webhook is tried."""
TRUSTED_S = KEPT_S / 2
CLAIM_S = 10.0
"""For two gateways that make a key of one name at the same moment."""
MAX_KEYS = 10_000
PAGE = 500


class KeyNotFound(NotFound):
    """There is no such API key."""

    code = "key_not_found"


class CreatedKey(NamedTuple):
    """A key at the only time that it can be seen."""

    record: ApiKey
    key: str


class KeyStore:
    """See the module's docstring."""

    def __init__(
        self,
        documents: DocumentStore,
        notices: Broadcast,
        *,
        clock: Callable[[], float] = clock.now,
        reread_s: float = REREAD_S,
    ) -> None:
        """Both are opened and closed by whoever made them."""
        self._documents = documents
        self._notices = notices
        self._clock = clock
        self._reread_s = reread_s
        self._index = KeyIndex(clock)
        self._raw: dict[str, bytes] = {}
        """What the store holds, as far as it was read: what has not changed is not parsed again."""
        self._loaded = False
        self._read_at = 0.0
        self._lock = asyncio.Lock()
        self._woken = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys, and follow them from now on. Does not raise because the store is away."""
        await self._notices.subscribe(TOPIC, self._woken.set)
        with contextlib.suppress(NexusError):
            await self.refresh()
        self._follower = asyncio.create_task(self._follow(), name="keys")

    async def close(self) -> None:
        """Follow no more."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)

    # What a request asks; see `gateway.auth.authenticator.KeyLookup`

    @property
    def is_empty(self) -> bool:
        """The keys have been read, and there was none."""
        return self._loaded and not self._raw

    def find(self, key: bytes) -> Principal:
        """Whose key this is. Raises AuthenticationFailed; Unavailable as long as the keys have never been read."""
        principal = self._index.find(key)
        if principal is not None:
            return principal
        if not self._loaded and is_created(key):
            raise Unavailable("the API keys cannot be read yet; try again shortly", retry_after_s=2.0)
        raise AuthenticationFailed(UNKNOWN_KEY)

    def get(self, key_id: str) -> ApiKey | None:
        """What is known of a key, also when it was revoked or has expired."""
        return self._index.get(key_id)

    def max_running(self, key_id: str) -> int | None:
        """How many of a key's jobs may run at a time; None: any number, or there is no such key."""
        key = self._index.get(key_id)
        return key.max_running if key is not None else None

    def webhook_secret(self, key_id: str) -> str | None:
        """Also of a key that was revoked or has expired: its jobs are still told of."""
        key = self._index.get(key_id)
        return key.webhook_secret or None if key is not None else None

    # What an operator asks

    async def create(
        self,
        name: str,
        *,
        owner: str | None = None,
        scopes: Iterable[Scope],
        max_queued: int | None = None,
        max_running: int | None = None,
        expires_at: int | None = None,
    ) -> CreatedKey:
        """Make a key. Without an `owner` it gets one of its own, called like the key.

        Raises InvalidRequest, where that would make two tenants one or there are too many keys; Unavailable.
        """
        await self.refresh()
        if sum(key.revoked_at is None for key in self._index.all()) >= MAX_KEYS:
            raise InvalidRequest(f"there are {MAX_KEYS} keys, as many as there may be; revoke some")
        if owner is None:
            await self._claim(name)
        key = PREFIX + secrets.token_urlsafe(32)
        record = ApiKey(
            id=new_id("key_"),
            hash=hashlib.sha256(key.encode()).hexdigest(),
            hint=key[-4:],
            name=name,
            owner=owner or name,
            scopes=frozenset(scopes),
            max_queued=max_queued,
            max_running=max_running,
            created_at=int(self._clock()),
            expires_at=expires_at,
            webhook_secret="whsec_" + base64.b64encode(secrets.token_bytes(24)).decode(),
        )
        raw = record.model_dump_json().encode()
        await self._documents.add(KIND, "", record.id, raw, ttl_s=self._ttl_s(record))
        self._take(record, raw)
        self._notices.publish(TOPIC)
        log.info(
            "keys.created",
            key=record.id,
            name=name,
            owner=record.owner,
            scopes=sorted(scope.value for scope in record.scopes),
        )
        return CreatedKey(record, key)

    async def list_active(self) -> list[ApiKey]:
        """The keys that are not revoked, expired ones among them, the newest first. Raises Unavailable."""
        await self.refresh()
        return [key for key in self._index.all() if key.revoked_at is None]

    async def get_active(self, key_id: str) -> ApiKey:
        """One key that is not revoked. Raises KeyNotFound, Unavailable."""
        await self.refresh()
        key = self._index.get(key_id)
        if key is None or key.revoked_at is not None:
            raise KeyNotFound(f"there is no API key '{key_id[:100]}'; GET /v1/keys lists them")
        return key

    async def revoke(self, key_id: str) -> ApiKey:
        """End a key for good: refused here from now on, and everywhere as the module says. Raises as `get_active`."""
        key = (await self.get_active(key_id)).model_copy(update={"revoked_at": int(self._clock())})
        await self._mark_revoked(key)
        self._notices.publish(TOPIC)
        log.info("keys.revoked", key=key.id, name=key.name, owner=key.owner)
        return key

    # The store

    async def _claim(self, owner: str) -> None:
        """Two tenants never share what they own by accident. Raises InvalidRequest."""
        taken = owner == BOOTSTRAP_OWNER or any(key.owner == owner for key in self._index.all())
        if taken or not await self._documents.add("key-owner", "", owner, b"{}", ttl_s=CLAIM_S):
            raise InvalidRequest(
                f"'{owner}' owns jobs and files already: choose another name, or say that '{owner}' is the owner to share them",
                param="name",
            )

    async def refresh(self) -> None:
        """Read all keys, and mend what the store has lost. Raises Unavailable."""
        async with self._lock:
            known = list(self._raw)
            stored = await self._read()
            trusted = self._clock() - self._read_at < TRUSTED_S
            self._loaded, self._read_at = True, self._clock()
            for key_id, raw in stored.items():
                if self._raw.get(key_id) != raw:
                    await self._learn(key_id, raw)
            lost = [key_id for key_id in known if key_id not in stored]
            if lost:
                await self._give_back(lost, trusted=trusted)

    async def _follow(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self.refresh()
            except NexusError as error:
                log.debug("keys.refresh_failed", error=str(error))  # the store itself says when it is away
            except Exception:
                log.exception("keys.refresh_crashed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._reread_s * max(1.0, len(self._raw) / 1000)):
                    await self._woken.wait()

    async def _read(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        after = ""
        while page := await self._documents.page(KIND, "", after=after, limit=PAGE, newest_first=False):
            found.update(page)
            after = page[-1][0]
        return found

    async def _learn(self, key_id: str, raw: bytes) -> None:
        """Believe the store, but never that a revoked key is good again."""
        key = _parse(key_id, raw)
        known = self._index.get(key_id)
        if key is None:
            self._raw[key_id] = raw
        elif known is not None and known.revoked_at is not None and key.revoked_at is None:
            await self._mark_revoked(known)
            self._notices.publish(TOPIC)
        else:
            self._take(key, raw)

    async def _give_back(self, lost: list[str], *, trusted: bool) -> None:
        """Keys that only we know: their time is over, or the store has lost its data."""
        returned = 0
        for key_id in lost:
            key = self._index.get(key_id)
            ttl_s = self._ttl_s(key) if key is not None else 0.0
            if not trusted or (ttl_s is not None and ttl_s <= 0):
                self._raw.pop(key_id, None)
                self._index.drop(key_id)
            else:
                ours = self._raw[key_id]
                if await self._documents.add(KIND, "", key_id, ours, ttl_s=ttl_s):
                    returned += 1
                elif (theirs := await self._documents.get(KIND, "", key_id)) not in (None, ours):
                    await self._learn(key_id, theirs)  # another gateway was first, which may not know of a revocation
        if returned:
            log.warning("keys.restored", keys=returned)

    async def _mark_revoked(self, key: ApiKey) -> None:
        raw = key.model_dump_json().encode()
        ttl_s = self._ttl_s(key)
        await self._documents.put(KIND, "", key.id, raw, ttl_s=max(1.0, ttl_s or 0.0))
        self._take(key, raw)

    def _take(self, key: ApiKey, raw: bytes) -> None:
        self._raw[key.id] = raw
        self._index.put(key)

    def _ttl_s(self, key: ApiKey) -> float | None:
        """How long it is still to be kept; None: for good."""
        ends = [moment for moment in (key.expires_at, key.revoked_at) if moment is not None]
        return min(ends) + KEPT_S - self._clock() if ends else None


def _parse(key_id: str, raw: bytes) -> ApiKey | None:
    try:
        key = ApiKey.model_validate_json(raw)
        if key.id == key_id and len(bytes.fromhex(key.hash)) == hashlib.sha256().digest_size:
            return key
        problem = "its id or its hash is none"
    except ValueError as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    log.warning("keys.record_unreadable", key=key_id, error=problem)
    return None


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
