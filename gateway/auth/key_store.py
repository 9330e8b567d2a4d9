"""Store API keys, teams and people in the document store, with a copy in every gateway's memory.

Guarantees beside those of `gateway.auth.replica`:
- A key itself is stored nowhere: `create` and `rotate` return it once, and the store holds its SHA-256.
- A request never waits for the store: `find` looks the key up in memory, with its limits, and checks revocation and expiry.
- A change takes effect here at once, and at other gateways when they receive the broadcast (milliseconds). If the broadcast is
  lost, it takes effect with their next refresh: every two seconds per thousand records, while the store is reachable.
- A gateway that has never read the keys cannot tell a valid key from an invalid one: it answers 503 to a key that looks like a
  created one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import structlog

from backbone.bus.broadcast import Broadcast
from backbone.ids import new_id
from backbone.store.documents import DocumentStore
from gateway import clock
from gateway.auth.authenticator import BOOTSTRAP_OWNER, PREFIX, UNKNOWN_KEY, Principal, is_created
from gateway.auth.key_index import KeyIndex
from gateway.auth.replica import RecordReplica
from gateway.limits.effective import AssignedBudget, EffectiveLimits, assigned_budgets
from schemas.errors import AuthenticationFailed, InvalidRequest, NexusError, NotFound, Unavailable
from schemas.inspection import Inspection
from schemas.keys import AccessLimits, ApiKey, Scope, Team
from schemas.people import Person

log = structlog.get_logger(__name__)

KIND = "key"
TEAM_KIND = "team"
PERSON_KIND = "person"
PERSON_KEEP_S = 400 * 86_400
"""Time for which a person who does not sign in is remembered; a disabled one is never forgotten."""
USED_KIND = "key-used"
TOPIC = "keys"
"""Topic of the broadcast that keys or teams have changed."""
REFRESH_INTERVAL_S = 2.0
"""Per thousand records, which take 8 ms to read."""
USED_INTERVAL_S = 60.0
"""Between two notes of which keys were used."""
USED_KEEP_S = 400 * 86_400.0
TEAM_PREFIX = "team:"
"""Prefix of a team's id where the id of a key is expected."""
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
    """Creates, finds, lists, changes and revokes API keys; the module's docstring lists the guarantees."""

    def __init__(
        self,
        documents: DocumentStore,
        broadcast: Broadcast,
        *,
        defaults: AccessLimits | None = None,
        clock: Callable[[], float] = clock.now,
        refresh_interval_s: float = REFRESH_INTERVAL_S,
    ) -> None:
        """Begin without keys. The composition root starts and closes `documents` and `broadcast`.

        `defaults`: the limits of a team where it has none of its own.
        """
        self._documents = documents
        self._broadcast = broadcast
        self._clock = clock
        self._refresh_interval_s = refresh_interval_s
        self._index = KeyIndex(defaults, clock)
        self._replica = RecordReplica(
            documents,
            KIND,
            parse=_parse,
            end=_end,
            is_final=lambda key: key.revoked_at is not None,
            on_change=self._on_key_change,
            clock=clock,
        )
        self.teams = RecordReplica(
            documents,
            TEAM_KIND,
            parse=Team.model_validate_json,
            end=lambda team: team.deleted_at,
            is_final=lambda _: False,
            on_change=self._index.put_team,
            clock=clock,
        )
        """The records of teams; `gateway.auth.team_store` changes them."""
        self.people = RecordReplica(
            documents,
            PERSON_KIND,
            parse=Person.model_validate_json,
            end=lambda person: None if person.disabled_at is not None else person.signed_in_at + PERSON_KEEP_S,
            is_final=lambda _: False,
            on_change=self._on_person_change,
            clock=clock,
        )
        """The records of people; `gateway.people.people_store` changes them."""
        self._people_access: dict[str, tuple[object, ...]] = {}
        self.on_revoked: Callable[[str], None] = lambda _key_id: None
        """Receives the id of each key that this gateway learns to be revoked, and of each person whose access has changed."""
        self._revoked: set[str] = set()
        self._has_loaded = False
        self._used_at = 0.0
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
        return self._has_loaded and not len(self._replica)

    def find(self, key: bytes) -> Principal:
        """Return the principal of a key. Raises AuthenticationFailed; Unavailable while the keys have never been read."""
        principal = self._index.find(hashlib.sha256(key).digest())
        if principal is not None:
            return principal
        if not self._has_loaded and is_created(key):
            raise _not_loaded()
        raise AuthenticationFailed(UNKNOWN_KEY)

    def find_hash(self, digest: bytes) -> Principal:
        """Return the principal of the key with this SHA-256. Raises as `find` does."""
        principal = self._index.find(digest)
        if principal is not None:
            return principal
        raise AuthenticationFailed(UNKNOWN_KEY) if self._has_loaded else _not_loaded()

    def signed_in(self, person_id: str, since: float) -> Principal | None:
        """Return the principal of a person whose session began at `since`; None if the session has ended, or the person's access.

        Raises Unavailable while the records have never been read.
        """
        if not self._has_loaded:
            raise _not_loaded()
        return self._index.signed_in(person_id, since)

    def person_of(self, key_id: str) -> str:
        """Return the id of the person behind a key or a session; empty: nobody in particular."""
        return self._index.person_of(key_id)

    def keys_of(self, person_id: str) -> list[str]:
        """Return the ids of the keys that a person made, and the person's own, under which the person's sessions act."""
        return self._index.keys_of(person_id)

    def get(self, key_id: str) -> ApiKey | None:
        """Return the record of a key, also of one that was revoked or has expired; None for an unknown key."""
        return self._replica.get(key_id)

    def is_revoked(self, key_id: str) -> bool:
        """Return whether a key is known to be revoked, or a person to be disabled."""
        return key_id in self._revoked

    def limits(self, key_id: str) -> EffectiveLimits:
        """Return the limits of a key; none for the bootstrap key (empty id) and for an unknown key."""
        return self._index.limits(key_id)

    def team_limits(self, team_id: str) -> AccessLimits:
        """Return the limits of a team, with the defaults where it has none of its own."""
        return self._index.team_limits(team_id)

    def assigned_budgets(self) -> list[AssignedBudget]:
        """Return the budgets of all keys that are not revoked and of all teams, sorted by name."""
        keys = (assigned_budgets("key", key.id, key) for key in self._replica.all() if key.revoked_at is None)
        teams = (assigned_budgets("team", team.id, team) for team in self.teams.all() if team.deleted_at is None)
        return sorted((one for budgets in (*keys, *teams) for one in budgets), key=lambda one: one.name)

    def webhook_secret(self, key_id: str) -> str | None:
        """Return a key's or a person's webhook secret, also of one that has ended: its jobs still send webhooks.

        A team signs webhooks of its budgets by the id `team:<id>`.
        """
        if key_id.startswith(TEAM_PREFIX):
            team = self.teams.get(key_id.removeprefix(TEAM_PREFIX))
            return team.webhook_secret or None if team is not None else None
        key = self._replica.get(key_id) or self.people.get(key_id)
        return key.webhook_secret or None if key is not None else None

    # Operations of operators

    async def create(
        self,
        name: str,
        *,
        owner: str | None = None,
        scopes: Iterable[Scope],
        expires_at: int | None = None,
        person: str = "",
        **limits: Any,
    ) -> IssuedKey:
        """Create a key. Without `owner`, the key gets a team of its own, with the key's name. `limits`: of `AccessLimits`.

        Raises InvalidRequest if a team of that name exists already or there are `MAX_KEYS` keys; Unavailable.
        """
        await self.refresh()
        if sum(key.revoked_at is None for key in self._replica.all()) >= MAX_KEYS:
            raise InvalidRequest(f"There are {MAX_KEYS} API keys, the most that are possible. Revoke some first.")
        if owner is None:
            await self._claim(name)
        key = _new_key()
        record = ApiKey(
            id=new_id("key_"),
            hash=_hash(key),
            hint=key[-4:],
            name=name,
            owner=owner or name,
            scopes=frozenset(scopes),
            created_at=int(self._clock()),
            expires_at=expires_at,
            webhook_secret=new_webhook_secret(),
            person=person,
            **limits,
        )
        await self._replica.add(record)
        self.publish()
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
        active = (key for key in self._replica.all() if key.revoked_at is None)
        return sorted(active, key=lambda key: key.id, reverse=True)

    async def get_active(self, key_id: str) -> ApiKey:
        """Return a key that is not revoked. Raises KeyNotFound, Unavailable."""
        await self.refresh()
        key = self._replica.get(key_id)
        if key is None or key.revoked_at is not None:
            raise KeyNotFound(f"There is no API key '{key_id[:100]}'. GET /v1/keys lists all keys.")
        return key

    async def change(self, key_id: str, **changes: Any) -> ApiKey:
        """Change a key's name, scopes, end or limits. Raises KeyNotFound, Unavailable."""
        key = await self._update(await self.get_active(key_id), changes)
        log.info("keys.changed", key=key.id, name=key.name, owner=key.owner, fields=sorted(changes))
        return key

    async def rotate(self, key_id: str, overlap_s: int) -> IssuedKey:
        """Replace a key; the replaced one stays valid for `overlap_s` seconds. Raises KeyNotFound, Unavailable."""
        old = await self.get_active(key_id)
        key = _new_key()
        changes = {
            "hash": _hash(key),
            "hint": key[-4:],
            "old_hash": old.hash,
            "old_hash_until": int(self._clock()) + overlap_s,
        }
        record = await self._update(old, changes)
        log.info("keys.rotated", key=record.id, name=record.name, owner=record.owner, overlap_s=overlap_s)
        return IssuedKey(record, key)

    async def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key: at once here, and at other gateways as the module's docstring says. Raises KeyNotFound, Unavailable."""
        key = await self._update(await self.get_active(key_id), {"revoked_at": int(self._clock())})
        log.info("keys.revoked", key=key.id, name=key.name, owner=key.owner)
        return key

    async def last_used(self, keys: Iterable[ApiKey]) -> dict[str, int]:
        """Return when keys were last used, in Unix seconds, about a minute late; without those never used. Raises Unavailable."""
        wanted = {key.id for key in keys}
        if len(wanted) == 1:
            one = next(iter(wanted))
            found = await self._documents.get(USED_KIND, "", one)
            return {one: int(found)} if found is not None else {}
        used: dict[str, int] = {}
        after = ""
        while page := await self._documents.page(USED_KIND, "", after=after, limit=PAGE_SIZE, newest_first=False):
            used |= {key_id: int(at) for key_id, at in page if key_id in wanted}
            after = page[-1][0]
        return used

    def publish(self) -> None:
        """Notify all gateways that keys, teams or people have changed."""
        self._broadcast.publish(TOPIC)

    async def refresh(self) -> None:
        """Read all keys, teams and people, and write back those that the store has lost. Raises Unavailable."""
        async with self._lock:
            written = [await self.teams.refresh(), await self.people.refresh(), await self._replica.refresh()]
            self._has_loaded = True
        if any(written):
            self.publish()

    async def _update(self, key: ApiKey, changes: dict[str, Any]) -> ApiKey:
        new = key.model_copy(update=changes | {"version": key.version + 1})
        await self._replica.put(new)
        self.publish()
        return new

    def weight(self, owner: str) -> int:
        """Return the weight of a team; 1 for one without a record."""
        team = self.teams.get(owner)
        return team.weight if team is not None else 1

    def inspection(self, owner: str) -> Inspection | None:
        """Return what administrators inspect of a team's requests; it may have ended."""
        team = self.teams.get(owner)
        return team.inspection if team is not None and team.deleted_at is None else None

    def inspected_teams(self) -> list[Team]:
        """Return the teams of which something is or was inspected."""
        return [team for team in self.teams.all() if team.inspection is not None and team.deleted_at is None]

    async def _claim(self, owner: str) -> None:
        """Reserve an owner's name for a new key, so that two tenants never share data by accident. Raises InvalidRequest."""
        team = self.teams.get(owner)
        taken = owner == BOOTSTRAP_OWNER or (team is not None and team.deleted_at is None)
        taken = taken or any(key.owner == owner for key in self._replica.all())
        taken = taken or any(person.team == owner for person in self.people.all())
        if taken or not await self._documents.add("key-owner", "", owner, b"{}", ttl_s=CLAIM_S):
            raise InvalidRequest(
                f"'{owner}' owns jobs and files already. Choose another name, or set 'owner' to '{owner}' to share them.",
                param="name",
            )

    def _on_key_change(self, key_id: str, key: ApiKey | None) -> None:
        self._index.put_key(key_id, key)
        if key is None:
            self._revoked.discard(key_id)
        elif key.revoked_at is not None and key_id not in self._revoked:
            self._revoked.add(key_id)
            self.on_revoked(key_id)

    def _on_person_change(self, person_id: str, person: Person | None) -> None:
        self._index.put_person(person_id, person)
        access = None if person is None else (person.disabled_at, person.sessions_after, person.role, person.team)
        known = self._people_access.pop(person_id, None)
        if access is not None:
            self._people_access[person_id] = access
        if person is not None and person.disabled_at is not None:
            self._revoked.add(person_id)
        else:
            self._revoked.discard(person_id)
        if known is not None and known != access:
            self.on_revoked(person_id)

    async def _refresh_forever(self) -> None:
        while True:
            self._changed.clear()
            try:
                await self.refresh()
                await self._note_used()
            except NexusError as error:
                log.debug("keys.refresh_failed", error=str(error))  # the store logs its own outages
            except Exception:
                log.exception("keys.refresh_crashed")
            records = len(self._replica) + len(self.teams) + len(self.people)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_interval_s * max(1.0, records / 1000)):
                    await self._changed.wait()

    async def _note_used(self) -> None:
        """Store which keys were used since the last note, at most once a minute. Raises Unavailable."""
        now = self._clock()
        if 0 <= now - self._used_at < USED_INTERVAL_S:
            return
        self._used_at = now
        value = b"%d" % now
        puts = (
            self._documents.put(USED_KIND, "", key_id, value, ttl_s=USED_KEEP_S) for key_id in self._index.take_used()
        )
        await asyncio.gather(*puts)


def _not_loaded() -> Unavailable:
    return Unavailable(
        "The gateway cannot read its API keys, as Redis is unavailable. Retry shortly.", retry_after_s=2.0
    )


def new_webhook_secret() -> str:
    """Return a new `whsec_` secret."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()


def _new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _parse(raw: bytes) -> ApiKey:
    key = ApiKey.model_validate_json(raw)
    hashes = [key.hash, key.old_hash] if key.old_hash else [key.hash]
    if any(len(bytes.fromhex(digest)) != hashlib.sha256().digest_size for digest in hashes):
        raise ValueError("its hash is not a SHA-256")
    return key


def _end(key: ApiKey) -> int | None:
    return min((end for end in (key.expires_at, key.revoked_at) if end is not None), default=None)
