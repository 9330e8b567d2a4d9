"""Remember, list and change the people who sign in. Their records are in the memory of every gateway, with those of keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from gateway import clock
from gateway.auth.key_store import KeyStore, new_webhook_secret
from gateway.people.group_rules import GroupRule, first_value, read_groups
from gateway.people.openid_connect import Claims, SignInFailed
from gateway.people.sessions import SessionStore
from schemas.errors import InvalidRequest, NotFound, PermissionDenied
from schemas.names import DISPLAY_NAME
from schemas.people import Person, Role, person_id

log = structlog.get_logger(__name__)

MAX_PEOPLE = 10_000
MAX_TEXT = 200


class PersonNotFound(NotFound):
    """There is no such person."""

    code = "person_not_found"


class NoRole(PermissionDenied):
    """The person may not use this gateway."""

    code = "no_role"


@dataclass(frozen=True, slots=True)
class GroupMapping:
    """What the groups of a person are worth."""

    claims: Sequence[str] = ("groups",)
    """Names of the claims that hold groups."""
    roles: Sequence[GroupRule] = ()
    teams: Sequence[GroupRule] = ()

    def role(self, groups: Sequence[str]) -> Role | None:
        """Return the role of the first matching rule; None: no rule matches."""
        value = first_value(self.roles, groups)
        return None if value is None else Role(value)

    def team(self, groups: Sequence[str]) -> str:
        """Return the team of the first matching rule; empty: no rule matches, or the name cannot be a team's."""
        value = first_value(self.teams, groups) or ""
        return value if len(value) <= MAX_TEXT and re.fullmatch(DISPLAY_NAME, value) else ""


class PeopleStore:
    """Changes the people whose records a `KeyStore` holds. Every method raises Unavailable while the store is unavailable."""

    def __init__(
        self,
        keys: KeyStore,
        sessions: SessionStore,
        mapping: GroupMapping | None = None,
        clock: Callable[[], float] = clock.now,
    ) -> None:
        self._keys = keys
        self._sessions = sessions
        self._mapping = mapping or GroupMapping()
        self._clock = clock

    async def sign_in(self, issuer: str, claims: Claims) -> Person:
        """Return the person whom a provider has identified, with the role and the team of today's groups.

        Raises NoRole if the person has no role, or is disabled; SignInFailed beyond `MAX_PEOPLE`.
        """
        groups = read_groups(claims, self._mapping.claims)
        role, team = self._mapping.role(groups), self._mapping.team(groups)
        found: dict[str, Any] = {
            "name": _text(claims.get("name")),
            "email": _text(claims.get("email")),
            "group_role": role,
            "group_team": team,
            "signed_in_at": int(self._clock()),
        }
        person = await self._keys.people.change(
            person_id(issuer, claims["sub"]), lambda old: old.model_copy(update=found | {"version": old.version + 1})
        )
        if person is None:
            if role is None:
                raise self._no_role(groups)
            person = await self._add(issuer, claims["sub"], found)
        else:
            await self._keys.people.put(person)  # prolongs its lifetime
        self._keys.publish()
        if person.disabled_at is not None:
            raise NoRole("Your access to this gateway is disabled. Ask its operator.", code="person_disabled")
        if person.role is None:
            raise self._no_role(groups)
        log.info("people.signed_in", person=person.id, role=person.role.value, team=person.team)
        return person

    async def list_all(self) -> list[Person]:
        """Return all people, those who signed in last first."""
        await self._keys.refresh()
        return sorted(self._keys.people.all(), key=lambda person: (-person.signed_in_at, person.id))

    async def get(self, person_id: str) -> Person:
        """Return a person. Raises PersonNotFound."""
        await self._keys.refresh()
        person = self._keys.people.get(person_id)
        if person is None:
            raise _not_found(person_id)
        return person

    async def change(self, person_id: str, **changes: Any) -> Person:
        """Change a person's role, team or access. What is open in its name ends if it may do less. Raises PersonNotFound."""
        person = await self._keys.people.change(
            person_id, lambda old: old.model_copy(update=changes | {"version": old.version + 1})
        )
        if person is None:
            raise _not_found(person_id)
        self._keys.publish()
        log.info("people.changed", person=person.id, fields=sorted(changes))
        return person

    async def end_sessions(self, person_id: str) -> Person:
        """End all sessions of a person, and the calls that are open in them. Raises PersonNotFound."""
        person = await self.change(person_id, sessions_after=self._clock())
        await self._sessions.end_all(person_id)
        return person

    async def count_sessions(self, person_id: str) -> int:
        """Return how many sessions a person has."""
        return await self._sessions.count(person_id)

    async def _add(self, issuer: str, subject: str, found: dict[str, Any]) -> Person:
        await self._keys.refresh()
        if len(self._keys.people) >= MAX_PEOPLE:
            raise SignInFailed(
                f"There are {MAX_PEOPLE} people, the most that are possible. Ask the operator of this gateway."
            )
        person = Person(
            id=person_id(issuer, subject),
            issuer=issuer,
            subject=subject,
            created_at=int(self._clock()),
            webhook_secret=new_webhook_secret(),
            **found,
        )
        if not await self._keys.people.add(person):
            raise InvalidRequest("You are signing in twice at once. Start again.")
        log.info("people.added", person=person.id, issuer=issuer)
        return person

    def _no_role(self, groups: Sequence[str]) -> NoRole:
        log.info("people.no_role", groups=list(groups)[:20])
        return NoRole(
            "None of your groups has a role here. Ask the operator of this gateway to add one of them to OIDC_ROLES."
        )


def _not_found(person_id: str) -> PersonNotFound:
    return PersonNotFound(f"There is no person '{person_id[:100]}'. GET /v1/people lists all people.")


def _text(value: Any) -> str:
    text = value.strip()[:MAX_TEXT].strip() if isinstance(value, str) else ""
    return text if re.fullmatch(DISPLAY_NAME, text) else ""
