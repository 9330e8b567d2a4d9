"""The response bodies of the routes of the audit log."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from schemas.audit import ActorKind, AuditResult


class AuditActor(BaseModel):
    """Who acted."""

    type: ActorKind
    team: str | None
    key: str | None
    """The id of the API key; null for the bootstrap key."""
    person: str | None


class AuditTarget(BaseModel):
    """What the action was about."""

    type: str
    id: str | None
    team: str | None
    """The team that it belongs to, where that is known."""


class AuditChange(BaseModel):
    """The values of one field. A long value is cut."""

    old: Any
    new: Any


class AuditEventObject(BaseModel):
    """One action, or several equal ones within a minute."""

    id: str
    object: Literal["audit_event"]
    sequence: int
    """Grows in the order in which events are stored, or get their result."""
    created_at: float
    """Unix seconds, with milliseconds."""
    actor: AuditActor
    action: str
    """A name such as `key.create`, which never changes."""
    target: AuditTarget
    address: str | None
    """The caller's IPv4 address or IPv6 /64 network, as trusted proxies report it."""
    request_id: str | None
    """The `x-request-id` of the answer; of the first one, if there were several."""
    result: AuditResult
    """`unknown`: the gateway was killed before it answered."""
    status: int | None
    """The status of the answer."""
    error: str | None
    """The error's code."""
    count: int
    """How many equal actions this is."""
    changes: dict[str, AuditChange]
    details: dict[str, Any]


class AuditEventList(BaseModel):
    """A page of audit events, newest first."""

    object: Literal["list"]
    data: list[AuditEventObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
