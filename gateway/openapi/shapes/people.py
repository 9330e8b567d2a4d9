"""The response bodies of routes for people and sessions."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from schemas.keys import Scope
from schemas.people import Role


class PersonObject(BaseModel):
    """A person who has signed in with the identity provider."""

    model_config = ConfigDict(title="Person")

    id: str
    object: Literal["person"]
    name: str
    email: str
    issuer: str
    """The identity provider."""
    subject: str
    """The provider's id of the person."""
    role: Role | None
    """Null: the person's groups give no role any more."""
    team: str
    """The team whose jobs, files and keys the person shares."""
    role_from: Literal["administrator", "groups"]
    team_from: Literal["administrator", "groups"]
    status: Literal["active", "disabled"]
    created_at: int
    """Unix seconds."""
    signed_in_at: int
    """The last sign-in, in Unix seconds."""
    sessions: int | None = None
    """The number of open sessions. Only for a single person."""


class PersonList(BaseModel):
    """All people."""

    object: Literal["list"]
    data: list[PersonObject]


class SessionObject(BaseModel):
    """The session of the caller."""

    model_config = ConfigDict(title="Session")

    object: Literal["session"]
    name: str
    role: Role | None
    """Null for the session of an API key."""
    team: str
    person: str | None
    """Id of the person."""
    key: str | None
    """Id of the API key with which the session began; empty for the bootstrap key. Null for a person."""
    scopes: list[Scope]
    csrf_token: str
    """Send it as the header `x-csrf-token` with each POST, PUT, PATCH and DELETE."""


class SessionEnded(BaseModel):
    """Confirmation that a session has ended."""

    object: Literal["session"]
    deleted: Literal[True]
    provider_url: str | None
    """Where the person can sign out at the identity provider too. Null: the provider offers no such page."""


class LoginLink(BaseModel):
    """A link that signs in once."""

    object: Literal["login_link"]
    url: str
    expires_at: int
    """Unix seconds."""
