"""Define people: who signed in, with which role, in which team."""

from __future__ import annotations

import hashlib
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from schemas.keys import ALL_SCOPES, Scope, granted

PREFIX = "person_"


class Role(StrEnum):
    """What a person may do."""

    VIEWER = "viewer"
    """Read the own team's jobs, files, batches and usage."""
    MEMBER = "member"
    """Also run inference and jobs, and manage the own team's keys."""
    OPERATOR = "operator"
    """Also operate: what the scopes `admin:read` and `admin:operate` allow."""
    ADMIN = "admin"
    """Everything, people included."""

    __hash__ = str.__hash__


MEMBER_SCOPES = frozenset({Scope.INFERENCE, Scope.JOBS})
ROLE_SCOPES: dict[Role, frozenset[Scope]] = {
    Role.VIEWER: MEMBER_SCOPES,
    Role.MEMBER: MEMBER_SCOPES,
    Role.OPERATOR: MEMBER_SCOPES | {Scope.ADMIN_READ, Scope.ADMIN_OPERATE},
    Role.ADMIN: granted(ALL_SCOPES),
}
"""The scopes of each role. A viewer only reads with them."""


class Person(BaseModel):
    """The record of a person who has signed in with OpenID Connect."""

    model_config = ConfigDict(frozen=True)

    id: str
    """`person_…`: made from `issuer` and `subject`, so that an identity has one record."""
    issuer: str
    subject: str
    """The provider's id of the person. Names and addresses change, this does not."""
    name: str = ""
    email: str = ""
    group_role: Role | None = None
    """The role that the groups gave at the last sign-in."""
    group_team: str = ""
    """The team that the groups gave at the last sign-in; empty: none."""
    set_role: Role | None = None
    """The role that an administrator set in place of the groups' role."""
    set_team: str | None = None
    """The team that an administrator set in place of the groups' team."""
    created_at: int
    """Unix seconds."""
    signed_in_at: int
    """The last sign-in, in Unix seconds."""
    disabled_at: int | None = None
    """Unix seconds; None: the person may sign in."""
    sessions_after: float = 0.0
    """Sessions that began at this time or before have ended. Unix seconds."""
    webhook_secret: str = ""
    """`whsec_` and base64: the secret that signs the webhooks of the person's jobs."""
    version: int = 0
    """Counts changes. Of two records, the one with the greater version is newer."""

    @property
    def role(self) -> Role | None:
        """The role that holds; None: the person has none, and cannot sign in."""
        return self.set_role or self.group_role

    @property
    def team(self) -> str:
        """The team that holds: a person without one has a team alone."""
        return self.set_team or self.group_team or self.id


def person_id(issuer: str, subject: str) -> str:
    """Return the id of the person whom a provider calls `subject`."""
    return PREFIX + hashlib.sha256(f"{issuer}\n{subject}".encode()).hexdigest()[:32]
