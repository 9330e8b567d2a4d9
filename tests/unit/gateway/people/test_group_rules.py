"""Rules that give roles and teams by group."""

from __future__ import annotations

from typing import Any

import pytest

from backbone.secret_files import ConfigurationError
from gateway.people.group_rules import parse_role_rules, parse_team_rules, read_groups
from gateway.people.people_store import GroupMapping
from schemas.people import Role

ROLES = 'admins=admin, "cn=ops,ou=groups,dc=example=operator", team-*=member'
TEAMS = "team-*=*, admins=core"


@pytest.mark.parametrize(
    ("groups", "role", "team"),
    [
        (["admins"], Role.ADMIN, "core"),
        (["team-vision", "admins"], Role.ADMIN, "vision"),
        (["cn=ops,ou=groups,dc=example"], Role.OPERATOR, ""),
        (["team-a\u202eb"], Role.MEMBER, ""),
        (["team-" + "x" * 300], Role.MEMBER, ""),
        (["team-"], None, ""),
        (["Admins"], None, ""),
        (["xadminsx"], None, ""),
        ([], None, ""),
    ],
)
def test_the_first_rule_that_matches_holds(groups: list[str], role: Role | None, team: str) -> None:
    """A group matches as a whole; a text that cannot be a team's name is none."""
    mapping = GroupMapping(roles=parse_role_rules("R", ROLES), teams=parse_team_rules("T", TEAMS))
    assert (mapping.role(groups), mapping.team(groups)) == (role, team)


def test_a_star_alone_is_everybody() -> None:
    """Also somebody without a group."""
    mapping = GroupMapping(roles=parse_role_rules("R", "admins=admin, *=viewer"), teams=parse_team_rules("T", "*=all"))
    assert (mapping.role([]), mapping.team([])) == (Role.VIEWER, "all")


@pytest.mark.parametrize("text", ["admins", "=admin", "admins=", "admins=root", "a*b*=admin"])
def test_a_wrong_rule_of_roles_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match="OIDC_ROLES"):
        parse_role_rules("OIDC_ROLES", text)


@pytest.mark.parametrize("text", ["admins=*", "*=*", "a=\x07"])
def test_a_wrong_rule_of_teams_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match="OIDC_TEAMS"):
        parse_team_rules("OIDC_TEAMS", text)


@pytest.mark.parametrize(
    ("claims", "groups"),
    [
        ({"groups": ["a", 1, None, "", "x" * 513, ["b"]]}, ["a"]),
        ({"groups": "a"}, ["a"]),
        ({"groups": {"a": 1}, "realm_access": {"roles": ["r"]}}, ["r"]),
        ({"realm_access": "x", "email": "ann@example.com"}, []),
        ({"email": "ann@example.com", "email_verified": True}, ["ann@example.com"]),
        ({"email": "ann@example.com", "email_verified": "true"}, []),
        ({"https://example.com/groups": ["u"]}, ["u"]),
    ],
)
def test_groups_are_read_from_claims(claims: dict[str, Any], groups: list[str]) -> None:
    """Whatever is in them; an address only if the provider has verified it."""
    names = ["groups", "realm_access.roles", "email", "https://example.com/groups"]
    assert read_groups(claims, names) == groups
