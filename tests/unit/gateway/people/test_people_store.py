"""People in the memory of several gateways."""

from __future__ import annotations

from typing import Any

import pytest

from backbone.testing.broadcast import MemoryBroadcast
from backbone.testing.documents import MemoryDocumentStore
from gateway.auth.key_store import PERSON_KEEP_S, KeyStore
from gateway.auth.replica import RETENTION_S
from gateway.auth.team_store import TeamStore
from gateway.people.group_rules import parse_role_rules, parse_team_rules
from gateway.people.people_store import GroupMapping, NoRole, PeopleStore
from gateway.people.sessions import SessionStore
from schemas.errors import InvalidRequest
from schemas.keys import AccessLimits, Scope
from schemas.people import Person, Role, person_id

ISSUER = "https://login.example"
MAPPING = GroupMapping(
    roles=parse_role_rules("R", "admins=admin, team-*=member"), teams=parse_team_rules("T", "team-*=*")
)


class Office:
    """Gateways that share a store."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.documents = MemoryDocumentStore(lambda: self.now)
        self.keys = [self._gateway() for _ in range(2)]
        self.people = [self._people(keys) for keys in self.keys]

    def _gateway(self) -> KeyStore:
        defaults = AccessLimits(max_open=9)
        return KeyStore(self.documents, MemoryBroadcast(), defaults=defaults, clock=lambda: self.now)

    def _people(self, keys: KeyStore) -> PeopleStore:
        sessions = SessionStore(self.documents, idle_s=60, longest_s=60, clock=lambda: self.now)
        return PeopleStore(keys, sessions, MAPPING, clock=lambda: self.now)

    async def sign_in(self, *groups: str, gateway: int = 0, **claims: Any) -> Person:
        person = await self.people[gateway].sign_in(ISSUER, {"sub": "ann", "groups": list(groups), **claims})
        for keys in self.keys:
            await keys.refresh()
        return person

    def principal(self, gateway: int = 1) -> Any:
        return self.keys[gateway].signed_in(person_id(ISSUER, "ann"), self.now)


async def test_a_person_is_a_principal_at_every_gateway() -> None:
    """With the role's scopes, the team's limits, and a secret for webhooks."""
    office = Office()
    person = await office.sign_in("team-vision", name="Ann\u202e", email="ann@example.com")
    found = office.principal()
    assert (found.owner, found.role, found.person, found.key_id) == ("vision", Role.MEMBER, person.id, person.id)
    assert (found.name, found.scopes) == ("ann@example.com", {Scope.INFERENCE, Scope.JOBS})
    assert [bound.name for bound in office.keys[1].limits(person.id).open] == ["team:vision"]
    assert office.keys[1].webhook_secret(person.id) == person.webhook_secret != ""
    assert office.keys[1].person_of(person.id) == person.id
    teams = TeamStore(office.keys[1], clock=lambda: office.now)
    assert [team.id for team in await teams.list_all()] == ["default", "vision"]
    with pytest.raises(InvalidRequest, match="1 people"):
        await teams.delete("vision")
    with pytest.raises(InvalidRequest, match="Choose another name"):
        await office.keys[1].create("vision", scopes=[Scope.JOBS])


async def test_what_an_administrator_sets_wins_until_it_is_removed() -> None:
    """Also over a sign-in at another gateway that has not heard of it."""
    office = Office()
    person = await office.sign_in("team-vision")
    await office.people[1].change(person.id, set_role=Role.OPERATOR, disabled_at=int(office.now))
    with pytest.raises(NoRole, match="disabled"):
        await office.people[0].sign_in(ISSUER, {"sub": "ann", "groups": ["admins"]})
    changed = await office.people[1].change(person.id, disabled_at=None)
    assert (changed.role, changed.team) == (Role.OPERATOR, person.id)
    assert (await office.people[0].change(person.id, set_role=None)).role is Role.ADMIN


async def test_a_person_without_a_role_any_more_is_out() -> None:
    """The sign-in that says so ends what is open; somebody who never had a role is not remembered."""
    office = Office()
    await office.sign_in("admins")
    ended: list[str] = []
    office.keys[1].on_revoked = ended.append
    with pytest.raises(NoRole, match="OIDC_ROLES"):
        await office.sign_in("others")
    await office.keys[1].refresh()
    assert office.principal() is None
    assert ended == [person_id(ISSUER, "ann")]
    with pytest.raises(NoRole):
        await office.people[0].sign_in(ISSUER, {"sub": "eve", "groups": []})
    assert [person.subject for person in await office.people[0].list_all()] == ["ann"]


async def test_ended_sessions_stay_ended_and_later_ones_count() -> None:
    office = Office()
    person = await office.sign_in("admins")
    before = office.now
    office.now += 1
    await office.people[0].end_sessions(person.id)
    await office.keys[1].refresh()
    assert office.keys[1].signed_in(person.id, before) is None
    office.now += 1
    assert office.principal() is not None


async def test_a_store_that_lost_its_people_gets_them_back() -> None:
    """A disabled person stays out."""
    office = Office()
    person = await office.sign_in("admins")
    await office.people[0].change(person.id, disabled_at=int(office.now))
    await office.keys[1].refresh()
    office.documents._documents.clear()
    await office.keys[1].refresh()
    assert office.principal() is None
    with pytest.raises(NoRole, match="disabled"):
        await office.people[1].sign_in(ISSUER, {"sub": "ann", "groups": ["admins"]})


async def test_who_does_not_come_back_is_forgotten() -> None:
    """Each sign-in begins the time again."""
    office = Office()
    await office.sign_in("admins")
    office.now += PERSON_KEEP_S
    await office.sign_in("admins")
    office.now += PERSON_KEEP_S
    assert len(await office.people[0].list_all()) == 1
    office.now += RETENTION_S + 1
    assert await office.people[0].list_all() == []
