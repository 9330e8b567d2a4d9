"""What will be recorded of one administrative request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from gateway.audit.events import NOBODY, Actor, actor_of, compare
from gateway.auth.authenticator import Principal
from gateway.http.asgi import Scope

AUDIT_ENTRY = "nexus.audit_entry"
"""Where the scope of a request holds its `AuditEntry`."""


class EntryRecorder(Protocol):
    """Records entries."""

    def begin_entry(self, entry: AuditEntry) -> str:
        """Record that an action begins, and return the event's id."""

    def end_entry(self, entry: AuditEntry, status: int, error: str) -> None:
        """Record how an action ended."""


class AuditEntry:
    """Collects what is known of an action. Without a recorder it takes everything, and records nothing."""

    __slots__ = (
        "_recorder", "action", "actor", "changes", "details", "id", "is_allowed", "reads", "scope", "target", "target_team",
    )  # fmt: skip

    def __init__(
        self, recorder: EntryRecorder | None, action: str, scope: Scope, *, reads: bool, target: str = ""
    ) -> None:
        """Begin without a caller. `reads`: the action changes nothing."""
        self._recorder = recorder
        self.id = ""
        """Id of the event, if its beginning is recorded."""
        self.action = action
        self.scope = scope
        self.reads = reads
        self.actor: Actor = NOBODY
        self.is_allowed = False
        self.target = target
        self.target_team = ""
        self.changes: dict[str, Any] = {}
        """By field, the old and the new value; see `compare`."""
        self.details: dict[str, Any] = {}
        """What else matters. No secrets."""

    def identify(self, principal: Principal) -> None:
        """Note who calls. An entry without a caller is not recorded: the refusal of its key is."""
        self.actor = actor_of(principal)

    def allow(self) -> None:
        """Note that the caller may do it. From here on, a change is recorded even if the gateway is killed."""
        self.is_allowed = True
        if self._recorder is not None and not self.reads:
            self.id = self._recorder.begin_entry(self)

    def compare(self, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> None:
        """Note which fields changed. None: there was or is no such object. Secrets must not be among the fields."""
        self.changes = compare(old, new)

    def end(self, status: int, error: str = "") -> None:
        """Record the action with the status and the error code of its answer."""
        if self._recorder is not None and self.actor is not NOBODY:
            self._recorder.end_entry(self, status, error)


def entry_of(scope: Scope) -> AuditEntry:
    """Return the entry of a request; one that records nothing, if the gateway has no audit log."""
    entry: AuditEntry | None = scope.get(AUDIT_ENTRY)
    return entry if entry is not None else AuditEntry(None, "", scope, reads=True)
