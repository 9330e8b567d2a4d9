"""Find the principal of an API key in memory, with the limits that hold for it."""

from __future__ import annotations

from collections.abc import Callable

from gateway import clock
from gateway.auth.authenticator import KeyEnded, Principal
from gateway.limits.effective import NO_LIMITS, EffectiveLimits, resolve_limits
from schemas.keys import LIMITS, AccessLimits, ApiKey, Team, granted
from schemas.people import ROLE_SCOPES, Person

REVOKED = "This API key was revoked. Ask the operator of this gateway for another one."
EXPIRED = "This API key has expired. Ask the operator of this gateway for another one."
REPLACED = "This API key was replaced by a new one, and its time of overlap is over. Use the new key."


class _Entry:
    __slots__ = ("ended", "expires_at", "expiry_message", "is_used", "principal")

    def __init__(self, principal: Principal, ended: str, expires_at: int | None, expiry_message: str = EXPIRED) -> None:
        self.principal = principal
        self.ended = ended
        """The message for a key that has ended; empty: it is valid until `expires_at`."""
        self.expires_at = expires_at
        self.expiry_message = expiry_message
        self.is_used = False


class KeyIndex:
    """Finds keys by their hashes. It holds revoked and expired keys too, for exact errors."""

    def __init__(self, defaults: AccessLimits | None = None, clock: Callable[[], float] = clock.now) -> None:
        """`defaults`: the limits of a team where it has none of its own."""
        self._defaults = defaults or AccessLimits()
        self._clock = clock
        self._keys: dict[str, ApiKey] = {}
        self._teams: dict[str, Team] = {}
        self._people: dict[str, Person] = {}
        self._by_hash: dict[bytes, _Entry] = {}
        self._principals: dict[str, Principal] = {}

    def put_key(self, key_id: str, key: ApiKey | None) -> None:
        """Add, replace or (None) forget a key."""
        old = self._keys.pop(key_id, None)
        if old is not None:
            for digest in (old.hash, old.old_hash):
                self._by_hash.pop(bytes.fromhex(digest), None)
            del self._principals[key_id]
        if key is not None:
            self._keys[key_id] = key
            self._enter(key)

    def put_person(self, person_id: str, person: Person | None) -> None:
        """Add, replace or (None) forget a person."""
        if person is None:
            self._people.pop(person_id, None)
            self._principals.pop(person_id, None)
        else:
            self._people[person_id] = person
            self._enter_person(person)

    def put_team(self, team_id: str, team: Team | None) -> None:
        """Add, replace or (None) forget a team, and resolve the limits of its keys and people again."""
        if team is None or team.deleted_at is not None:
            self._teams.pop(team_id, None)
        else:
            self._teams[team_id] = team
        for key in self._keys.values():
            if key.owner == team_id:
                self._enter(key)
        for person in self._people.values():
            if person.team == team_id:
                self._enter_person(person)

    def team_limits(self, team_id: str) -> AccessLimits:
        """Return the limits of a team: its own, and the defaults for the others."""
        team = self._teams.get(team_id)
        if team is None:
            return self._defaults
        own = {name: value for name in LIMITS if (value := getattr(team, name)) is not None}
        return self._defaults.model_copy(update=own)

    def find(self, digest: bytes) -> Principal | None:
        """Return the principal of the key with this SHA-256; None for an unknown key. Raises KeyEnded if it is revoked
        or expired.
        """
        entry = self._by_hash.get(digest)
        if entry is None:
            return None
        if entry.ended:
            raise KeyEnded(entry.ended, entry.principal)
        if entry.expires_at is not None and entry.expires_at <= self._clock():
            raise KeyEnded(entry.expiry_message, entry.principal)
        entry.is_used = True
        return entry.principal

    def principal(self, key_id: str) -> Principal | None:
        """Return the principal of a key or a person, also of one that has ended; None for an unknown id."""
        return self._principals.get(key_id)

    def signed_in(self, person_id: str, since: float) -> Principal | None:
        """Return the principal of a person whose session began at `since`; None if the session has ended, or the person's access."""
        person = self._people.get(person_id)
        if person is None or person.disabled_at is not None or person.role is None or since <= person.sessions_after:
            return None
        team = self._teams.get(person.team)
        if team is not None and team.expires_at is not None and team.expires_at <= self._clock():
            return None
        return self._principals[person_id]

    def person_of(self, key_id: str) -> str:
        """Return the id of the person behind a key or a session; empty: nobody in particular."""
        principal = self._principals.get(key_id)
        return principal.person if principal is not None else ""

    def keys_of(self, person_id: str) -> list[str]:
        """Return the ids of the keys that a person made, and the person's own, under which the person's sessions act."""
        return [key_id for key_id, principal in self._principals.items() if principal.person == person_id]

    def limits(self, key_id: str) -> EffectiveLimits:
        """Return the limits of a key or a person; none for the bootstrap key and for an unknown id."""
        principal = self._principals.get(key_id)
        return principal.limits if principal is not None else NO_LIMITS

    def take_used(self) -> set[str]:
        """Return the ids of the keys that were used since the last call."""
        used = set()
        for entry in self._by_hash.values():
            if entry.is_used:
                entry.is_used = False
                used.add(entry.principal.key_id)
        return used

    def _enter(self, key: ApiKey) -> None:
        team = self._teams.get(key.owner)
        principal = Principal(
            owner=key.owner,
            key_id=key.id,
            name=key.name,
            scopes=granted(key.scopes),
            limits=resolve_limits(
                key, key.id, self.team_limits(key.owner), key.owner, team.inspection if team is not None else None
            ),
            webhook_secret=key.webhook_secret,
            person=key.person,
        )
        self._principals[key.id] = principal
        ends = [end for end in (key.expires_at, team.expires_at if team is not None else None) if end is not None]
        ended = REVOKED if key.revoked_at is not None else ""
        expires_at = min(ends, default=None)
        self._by_hash[bytes.fromhex(key.hash)] = _Entry(principal, ended, expires_at)
        if key.old_hash and key.old_hash_until is not None:
            until = min([key.old_hash_until, *ends])
            self._by_hash[bytes.fromhex(key.old_hash)] = _Entry(principal, ended, until, REPLACED)

    def _enter_person(self, person: Person) -> None:
        role, team = person.role, self._teams.get(person.team)
        inspection = team.inspection if team is not None else None
        self._principals[person.id] = Principal(
            owner=person.team,
            key_id=person.id,
            name=person.name or person.email or person.subject,
            scopes=ROLE_SCOPES[role] if role is not None else frozenset(),
            limits=resolve_limits(AccessLimits(), person.id, self.team_limits(person.team), person.team, inspection),
            webhook_secret=person.webhook_secret,
            person=person.id,
            role=role,
        )
