"""Make and encode audit events. No text in them is a secret, and none is unbounded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import orjson

from gateway.auth.authenticator import LENGTH, PREFIX, Principal
from gateway.usage.events import Values, decode_lines
from schemas.audit import FIELDS, ActorKind, AuditEvent

HEADER = orjson.dumps(FIELDS) + b"\n"
MAX_TARGET = 256
MAX_VALUE = 2048
"""Bytes of one old or new value, as JSON."""
_KEY = re.compile(rf"{PREFIX}[\w-]{{{LENGTH - len(PREFIX)},}}", re.ASCII)


class Actor(NamedTuple):
    """Who did it."""

    kind: ActorKind
    team: str = ""
    key: str = ""
    person: str = ""


NOBODY = Actor(ActorKind.NOBODY)


def actor_of(principal: Principal) -> Actor:
    """Return the actor behind a request."""
    if principal.role is not None:
        return Actor(ActorKind.PERSON, principal.owner, person=principal.person)
    kind = ActorKind.API_KEY if principal.key_id else ActorKind.BOOTSTRAP_KEY
    return Actor(kind, principal.owner, principal.key_id, principal.person)


def safe_text(text: str, secret: str = "") -> str:
    """Return a caller's text as the log stores it: cut, and without API keys. `secret`: the bootstrap key."""
    if secret:
        text = text.replace(secret, "[key]")
    text = _KEY.sub("[key]", text)[:MAX_TARGET].replace("\0", "")
    return text.encode(errors="replace").decode()


def compare(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return, by field, the old and the new value where they differ. None: there is no such object; its values are null."""
    before, after = old or {}, new or {}
    found = {}
    for name in dict.fromkeys((*before, *after)):
        values = {"old": _plain(before.get(name)), "new": _plain(after.get(name))}
        if values["old"] != values["new"]:
            found[name] = {side: _cut(value) for side, value in values.items()}
    return found


def encode_object(fields: Mapping[str, Any]) -> str:
    """Return a JSON object; empty text for an empty one."""
    return orjson.dumps(fields).decode() if fields else ""


def values_of(event: AuditEvent) -> Values:
    """Return the event as it travels, in the order of `FIELDS`."""
    return tuple(getattr(event, name) for name in FIELDS)


def decode_audit(data: bytes) -> Iterator[AuditEvent | ValueError]:
    """Yield the events of a batch, and an error for each that is malformed."""
    return decode_lines(data, AuditEvent)


def _plain(value: Any) -> Any:
    """Return a value as JSON can say it."""
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return list(value)
    return value


def _cut(value: Any) -> Any:
    text = orjson.dumps(value)
    return value if len(text) <= MAX_VALUE else text[:MAX_VALUE].decode(errors="ignore") + "…"
