"""Define the audit events: who did what to what, from where, with which result.

They travel as usage events do: a line with the names of the fields, then one line of JSON for each event; see `schemas.usage`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from schemas.usage import Text

MAX_JSON = 128 * 1024
"""Characters of changes or details."""
Json = Annotated[str, StringConstraints(max_length=MAX_JSON, pattern=r"^[^\x00]*$")]


class ActorKind(StrEnum):
    """What a caller identified itself by."""

    API_KEY = "api_key"
    BOOTSTRAP_KEY = "bootstrap_key"
    PERSON = "person"
    NOBODY = "nobody"
    """The caller had no key, or one that no gateway knows."""


class AuditResult(StrEnum):
    """How an action ended, by the status of its answer."""

    SUCCESS = "success"
    REFUSED = "refused"
    """401, 403 or 429: the caller was not allowed to."""
    FAILED = "failed"
    UNKNOWN = "unknown"
    """The gateway was killed before it answered. The action may have been done."""


REFUSED_STATUSES = (401, 403, 429)


def result_of(status: int) -> AuditResult:
    """Return the result of an answer; status 0: there was none."""
    if status == 0:
        return AuditResult.UNKNOWN
    if status in REFUSED_STATUSES:
        return AuditResult.REFUSED
    return AuditResult.SUCCESS if status < 400 else AuditResult.FAILED


class AuditEvent(BaseModel):
    """One action, or several equal ones within a minute. `id` is unique; it begins with the time, so that ids sort by it."""

    model_config = ConfigDict(frozen=True)

    id: Annotated[str, StringConstraints(pattern=r"^aud_[0-9a-f]{32}$")]
    at_ms: int = Field(ge=0, lt=2**48)
    """Unix milliseconds: when the action began, or when the last of several was counted."""
    actor: Text
    """An `ActorKind`."""
    team: Text = ""
    key: Text = ""
    """Id of the API key; empty for the bootstrap key and for unknown ones."""
    person: Text = ""
    action: Text
    """A dotted name, such as `key.create`. Names never change."""
    target_type: Text = ""
    target: Text = ""
    target_team: Text = ""
    """The team that the target belongs to, where it is known."""
    address: Text = ""
    """The caller's IPv4 address or IPv6 /64 network, as trusted proxies report it."""
    request_id: Text = ""
    """Of the first, if there are several."""
    status: int = Field(default=0, ge=0, le=999)
    """Of the answer; 0: there is none yet."""
    error: Text = ""
    """The error's code, or its type where it has no code."""
    count: int = Field(default=1, ge=1, lt=2**48)
    """How many equal actions this is."""
    changes: Json = ""
    """JSON: by field, its old and its new value. Empty: nothing that has fields was changed."""
    details: Json = ""
    """JSON: what else matters. Empty: nothing."""


FIELDS = tuple(AuditEvent.model_fields)
