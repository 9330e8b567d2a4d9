"""Give people roles and teams by the groups that their identity provider names."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from backbone.secret_files import ConfigurationError
from schemas.names import DISPLAY_NAME
from schemas.people import Role

MAX_GROUPS = 1000
MAX_GROUP_CHARS = 512
EVERYBODY = "*"


class GroupRule(NamedTuple):
    """One `GROUP=VALUE`: a `*` in the group stands for any text, and a `*` in the value for what that text was."""

    group: re.Pattern[str]
    value: str
    is_for_everybody: bool

    def apply(self, groups: Sequence[str]) -> str | None:
        """Return the value for the first matching group; None: none matches. `*` alone also matches people without a group."""
        if self.is_for_everybody:
            return self.value
        match = next((found for group in groups if (found := self.group.fullmatch(group))), None)
        return None if match is None else self.value.replace("*", match[1] if match.re.groups else "")


def first_value(rules: Sequence[GroupRule], groups: Sequence[str]) -> str | None:
    """Return the value of the first rule that matches; None: no rule does."""
    return next((value for rule in rules if (value := rule.apply(groups)) is not None), None)


def parse_role_rules(setting: str, text: str) -> tuple[GroupRule, ...]:
    """Parse `GROUP=ROLE` rules. Raises ConfigurationError."""
    rules = tuple(_parse(setting, text))
    for rule in rules:
        if rule.value not in tuple(Role):
            raise ConfigurationError(f"{setting}: '{rule.value}' is no role. Use one of: {', '.join(Role)}.")
    return rules


def parse_team_rules(setting: str, text: str) -> tuple[GroupRule, ...]:
    """Parse `GROUP=TEAM` rules. Raises ConfigurationError."""
    rules = tuple(_parse(setting, text))
    for rule in rules:
        if "*" in rule.value and (rule.is_for_everybody or not rule.group.groups):
            raise ConfigurationError(f"{setting}: the team '{rule.value}' has a '*', but its group has none.")
        if not re.fullmatch(DISPLAY_NAME, rule.value):
            raise ConfigurationError(f"{setting}: '{rule.value}' cannot be a team's name.")
    return rules


def _parse(setting: str, text: str) -> Iterable[GroupRule]:
    """Yield the rules. A rule with a comma, such as an LDAP name, stands in double quotes."""
    for entry in next(csv.reader([text.replace("\n", " ")], skipinitialspace=True), []):
        if not entry.strip():
            continue
        group, equals, value = (part.strip() for part in entry.rpartition("="))
        if not equals or not group or not value:
            raise ConfigurationError(f"{setting}: '{entry.strip()}' must have the form GROUP=VALUE.")
        if group.count("*") > 1 or value.count("*") > 1:
            raise ConfigurationError(f"{setting}: '{entry.strip()}' has more than one '*' on a side.")
        pattern = re.compile(re.escape(group).replace(r"\*", "(.+)"))
        yield GroupRule(pattern, value, group == EVERYBODY)


def read_groups(claims: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Return the values of the claims with these names; `a.b` is the claim `b` inside `a`. An unverified address does not count."""
    found: list[str] = []
    for name in names:
        if name == "email" and claims.get("email_verified") is not True:
            continue
        value = _claim(claims, name)
        values = value if isinstance(value, list) else [value]
        found += [text for text in values if isinstance(text, str) and 0 < len(text) <= MAX_GROUP_CHARS]
    return found[:MAX_GROUPS]


def _claim(claims: dict[str, Any], name: str) -> Any:
    if name in claims:  # a name may have dots: https://example.com/groups
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
