"""Store created API keys in the document store, with a copy in every gateway's memory.

Guarantees:
- The key itself is stored nowhere: `create` returns it once, and the store holds its SHA-256.
- A request never waits for the store: `find` looks the key up in memory, and checks revocation and expiry.
- A change takes effect here at once, and at other gateways when they receive the broadcast (milliseconds). If the broadcast is
  lost, it takes effect with their next refresh: every two seconds per thousand keys, while the store is reachable.
- While the store is unavailable, known keys stay valid, and no key can be changed. A gateway that has never read the keys cannot
  tell a valid key from an invalid one: it answers 503 to a key that looks like a created one.
- A store that has lost its data gets the keys back from any gateway that knows them. A revoked key never becomes valid again:
  it stays in the store, marked, for `RETENTION_S`; a gateway that knows of a revocation repeats it if the store does not have it;
  and a gateway that has not read the store for `TRUSTED_S` forgets the keys that the store does not have.
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
"""Topic of the broadcast that keys have changed."""
REFRESH_INTERVAL_S = 2.0
"""Per thousand keys, which take 8 ms to read."""
RETENTION_S = 14 * 86_400.0
"""Time for which a key is remembered after its end: longer than any job lives and any webhook is retried."""
TRUSTED_S = RETENTION_S / 2
CLAIM_S = 10.0
"""Time for which an owner's name is reserved while its key is created, as two gateways may create one of that name at once."""
MAX_KEYS = 10_000
PAGE_SIZE = 500


class KeyNotFound(NotFound):
    """There is no such API key."""

    code = "key_not_found"


class IssuedKey(NamedTuple):
    """A new key with its record; the key cannot be read again."""

    record: ApiKey
    key: str


class KeyStore:
    """Creates, finds, lists and revokes API keys; the module's docstring lists the guarantees."""

    def __init__(
        self,
        documents: DocumentStore,
        broadcast: Broadcast,
        *,
        clock: Callable[[], float] = clock.now,
        refresh_interval_s: float = REFRESH_INTERVAL_S,
    ) -> None:
        """Begin without keys. The composition root starts and closes `documents` and `broadcast`."""
        self._documents = documents
        self._broadcast = broadcast
        self._clock = clock
        self._refresh_interval_s = refresh_interval_s
        self._index = KeyIndex(clock)
        self._stored: dict[str, bytes] = {}
        """Records as the store held them at the last refresh, so that unchanged ones are not parsed again."""
        self._has_loaded = False
        self._read_at = 0.0
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._refresher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys, and refresh them until `close`. Does not raise if the store is unavailable."""
        await self._broadcast.subscribe(TOPIC, self._changed.set)
        with contextlib.suppress(NexusError):
            await self.refresh()
        self._refresher = asyncio.create_task(self._refresh_forever(), name="keys")

    async def close(self) -> None:
        """Stop to refresh the keys."""
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)

    # Lookups in memory, as `gateway.auth.authenticator.KeyLookup` describes them

    @property
    def is_empty(self) -> bool:
        """Whether the keys were read and there are none."""
        return self._has_loaded and not self._stored

    def find(self, key: bytes) -> Principal:
        """Return the principal of a key. Raises AuthenticationFailed; Unavailable while the keys have never been read."""
        principal = self._index.find(key)
        if principal is not None:
            return principal
        if not self._has_loaded and is_created(key):
            raise Unavailable(
                "The gateway cannot read its API keys, as Redis is unavailable. Retry shortly.", retry_after_s=2.0
            )
        raise AuthenticationFailed(UNKNOWN_KEY)

    def get(self, key_id: str) -> ApiKey | None:
        """Return the record of a key, also of one that was revoked or has expired; None for an unknown key."""
        return self._index.get(key_id)

    def max_running(self, key_id: str) -> int | None:
        """Return how many of a key's jobs may run at once; None: any number, or the key is unknown."""
        key = self._index.get(key_id)
        return key.max_running if key is not None else None

    def webhook_secret(self, key_id: str) -> str | None:
        """Return a key's webhook secret, also of one that was revoked or has expired: its jobs still send webhooks."""
        key = self._index.get(key_id)
        return key.webhook_secret or None if key is not None else None

    # Operations of operators

    async def create(
        self,
        name: str,
        *,
        owner: str | None = None,
        scopes: Iterable[Scope],
        max_queued: int | None = None,
        max_running: int | None = None,
        expires_at: int | None = None,
    ) -> IssuedKey:
        """Create a key. Without `owner`, the key becomes an owner of its own, with the key's name.

        Raises InvalidRequest if an owner of that name exists already or there are `MAX_KEYS` keys; Unavailable.
        """
        await self.refresh()
        if sum(key.revoked_at is None for key in self._index.all()) >= MAX_KEYS:
            raise InvalidRequest(f"There are {MAX_KEYS} API keys, the most that are possible. Revoke some first.")
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
        self._put(record, raw)
        self._broadcast.publish(TOPIC)
        log.info(
            "keys.created",
            key=record.id,
            name=name,
            owner=record.owner,
            scopes=sorted(scope.value for scope in record.scopes),
        )
        return IssuedKey(record, key)

    async def list_active(self) -> list[ApiKey]:
        """Return the keys that are not revoked, including expired ones, newest first. Raises Unavailable."""
        await self.refresh()
        return [key for key in self._index.all() if key.revoked_at is None]

    async def get_active(self, key_id: str) -> ApiKey:
        """Return a key that is not revoked. Raises KeyNotFound, Unavailable."""
        await self.refresh()
        key = self._index.get(key_id)
        if key is None or key.revoked_at is not None:
            raise KeyNotFound(f"There is no API key '{key_id[:100]}'. GET /v1/keys lists all keys.")
        return key

    async def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key: at once here, and at other gateways as the module's docstring says. Raises KeyNotFound, Unavailable."""
        key = (await self.get_active(key_id)).model_copy(update={"revoked_at": int(self._clock())})
        await self._mark_revoked(key)
        self._broadcast.publish(TOPIC)
        log.info("keys.revoked", key=key.id, name=key.name, owner=key.owner)
        return key

    # The document store

    async def _claim(self, owner: str) -> None:
        """Reserve an owner's name for a new key, so that two tenants never share data by accident. Raises InvalidRequest."""
        taken = owner == BOOTSTRAP_OWNER or any(key.owner == owner for key in self._index.all())
        if taken or not await self._documents.add("key-owner", "", owner, b"{}", ttl_s=CLAIM_S):
            raise InvalidRequest(
                f"'{owner}' owns jobs and files already. Choose another name, or set 'owner' to '{owner}' to share them.",
                param="name",
            )

    async def refresh(self) -> None:
        """Read all keys, and write back the keys that the store has lost. Raises Unavailable."""
        async with self._lock:
            known = list(self._stored)
            stored = await self._read()
            trusted = self._clock() - self._read_at < TRUSTED_S
            self._has_loaded, self._read_at = True, self._clock()
            for key_id, raw in stored.items():
                if self._stored.get(key_id) != raw:
                    await self._take_over(key_id, raw)
            lost = [key_id for key_id in known if key_id not in stored]
            if lost:
                await self._restore(lost, trusted=trusted)

    async def _refresh_forever(self) -> None:
        while True:
            self._changed.clear()
            try:
                await self.refresh()
            except NexusError as error:
                log.debug("keys.refresh_failed", error=str(error))  # the store logs its own outages
            except Exception:
                log.exception("keys.refresh_crashed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_interval_s * max(1.0, len(self._stored) / 1000)):
                    await self._changed.wait()

    async def _read(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        after = ""
        while page := await self._documents.page(KIND, "", after=after, limit=PAGE_SIZE, newest_first=False):
            found.update(page)
            after = page[-1][0]
        return found

    async def _take_over(self, key_id: str, raw: bytes) -> None:
        """Take over a record of the store, unless it lacks a revocation that is known here."""
        key = _parse(key_id, raw)
        known = self._index.get(key_id)
        if key is None:
            self._stored[key_id] = raw
        elif known is not None and known.revoked_at is not None and key.revoked_at is None:
            await self._mark_revoked(known)
            self._broadcast.publish(TOPIC)
        else:
            self._put(key, raw)

    async def _restore(self, lost: list[str], *, trusted: bool) -> None:
        """Write back keys that only this gateway knows, or forget those whose retention is over."""
        returned = 0
        for key_id in lost:
            key = self._index.get(key_id)
            ttl_s = self._ttl_s(key) if key is not None else 0.0
            if not trusted or (ttl_s is not None and ttl_s <= 0):
                self._stored.pop(key_id, None)
                self._index.drop(key_id)
            else:
                ours = self._stored[key_id]
                if await self._documents.add(KIND, "", key_id, ours, ttl_s=ttl_s):
                    returned += 1
                elif (theirs := await self._documents.get(KIND, "", key_id)) not in (None, ours):
                    await self._take_over(key_id, theirs)  # another gateway was first, and may lack a revocation
        if returned:
            log.warning("keys.restored", keys=returned)

    async def _mark_revoked(self, key: ApiKey) -> None:
        raw = key.model_dump_json().encode()
        ttl_s = self._ttl_s(key)
        await self._documents.put(KIND, "", key.id, raw, ttl_s=max(1.0, ttl_s or 0.0))
        self._put(key, raw)

    def _put(self, key: ApiKey, raw: bytes) -> None:
        self._stored[key.id] = raw
        self._index.put(key)

    def _ttl_s(self, key: ApiKey) -> float | None:
        """Return for how many seconds a key is still stored; None: forever."""
        ends = [moment for moment in (key.expires_at, key.revoked_at) if moment is not None]
        return min(ends) + RETENTION_S - self._clock() if ends else None


def _parse(key_id: str, raw: bytes) -> ApiKey | None:
    try:
        key = ApiKey.model_validate_json(raw)
        if key.id == key_id and len(bytes.fromhex(key.hash)) == hashlib.sha256().digest_size:
            return key
        problem = "its id does not match, or its hash is not a SHA-256"
    except ValueError as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    log.warning("keys.record_unreadable", key=key_id, error=problem)
    return None


class _Entry(NamedTuple):
    principal: Principal
    expires_at: int | None
    revoked: bool


class KeyIndex:
    """Finds keys by id and by hash. It holds revoked and expired keys too, for exact errors and for webhook secrets."""

    def __init__(self, clock: Callable[[], float] = clock.now) -> None:
        self._clock = clock
        self._keys: dict[str, ApiKey] = {}
        self._by_hash: dict[bytes, _Entry] = {}

    def put(self, key: ApiKey) -> None:
        """Add a key, or replace the key with its id."""
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
        """Return the key with this id, also a revoked or expired one; None for an unknown id."""
        return self._keys.get(key_id)

    def all(self) -> list[ApiKey]:
        """Return every key, including revoked ones, newest first."""
        return sorted(self._keys.values(), key=lambda key: key.id, reverse=True)

    def find(self, key: bytes) -> Principal | None:
        """Return the principal of a key; None for an unknown key. Raises AuthenticationFailed if it is revoked or expired."""
        entry = self._by_hash.get(hashlib.sha256(key).digest())
        if entry is None:
            return None
        if entry.revoked:
            raise AuthenticationFailed("This API key was revoked. Ask the operator of this gateway for another one.")
        if entry.expires_at is not None and entry.expires_at <= self._clock():
            raise AuthenticationFailed("This API key has expired. Ask the operator of this gateway for another one.")
        return entry.principal
