"""Record audit events. Nothing here waits: an event is written into the journal, and reaches the database later."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Mapping
from time import monotonic
from typing import Any

import orjson

from backbone.ids import new_id
from gateway.audit.actions import ACCESS_DENIED, KEY_REFUSED, target_type_of
from gateway.audit.entry import AUDIT_ENTRY, AuditEntry
from gateway.audit.events import NOBODY, Actor, actor_of, encode_object, safe_text, values_of
from gateway.audit.summaries import Summaries
from gateway.auth.authenticator import Principal
from gateway.http.asgi import CALLER_INFO, REQUEST_ID, SESSION, Caller, Scope
from gateway.usage.events import Values
from schemas.audit import ActorKind, AuditEvent
from schemas.errors import NexusError

SUMMARY_INTERVAL_S = 5.0
MAX_REFUSALS = 256
"""Sources of refusals, and of denials, that are told apart at the same time; others are summed up together."""
MAX_READINGS = 1024
API = "/v1/"
ID_PREFIX = "aud_"
REFUSAL_RECORDED = "nexus.refusal"
"""Key in the scope of a request whose refusal is recorded."""


class AuditLog:
    """Records who did what. Owned by one event loop; every method returns at once, and none raises."""

    def __init__(
        self,
        emit: Callable[[Values], None],
        *,
        secret: str = "",
        person_of: Callable[[str], str] = lambda _key: "",
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`emit` takes events, and never raises. `secret`: the bootstrap key, which no text may hold. `person_of`: returns the id of the
        person who made a key, empty for none. `clock`: for sums.
        """
        self._emit = emit
        self._secret = secret
        self._person_of = person_of
        self.refusals: Summaries[AuditEvent] = Summaries(self._write_sum, clock, max_sources=MAX_REFUSALS)
        self.denials: Summaries[AuditEvent] = Summaries(self._write_sum, clock, max_sources=MAX_REFUSALS)
        self.readings: Summaries[AuditEvent] = Summaries(self._write_sum, clock, max_sources=MAX_READINGS)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to write the sums of each minute."""
        self._task = asyncio.create_task(self._write_sums())

    async def close(self) -> None:
        """Write the last sums."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self.refusals.write_all()
        self.denials.write_all()
        self.readings.write_all()

    def record(
        self,
        action: str,
        scope: Scope,
        *,
        actor: Actor = NOBODY,
        status: int = 200,
        error: str = "",
        target: str = "",
        target_team: str = "",
        changes: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Record one action that has ended, such as a login. Use `record_refusal` for what anybody without a key can cause.

        `scope`: of the HTTP request. `status`, `error`: of its answer. `changes`: as `events.compare` returns it. `details`: what
        else matters. Neither may hold a secret.
        """
        event = self._event(action, scope, actor, status, error, target=target, target_team=target_team)
        self._write(
            event.model_copy(update={"changes": encode_object(changes or {}), "details": encode_object(details or {})})
        )

    def record_refusal(
        self, scope: Scope, error: NexusError, principal: Principal | None = None, *, action: str = KEY_REFUSED
    ) -> None:
        """Record that a key, or a login, was refused: the first of a source at once, the others as a sum for each minute.

        `principal`: of a key that is known but may not be used: not from there, or no longer.
        """
        scope[REFUSAL_RECORDED] = None
        info = error.info
        actor = NOBODY if principal is None else actor_of(principal)
        code = info.code or info.type
        event = self._event(action, scope, actor, info.status, code, target=actor.key, target_team=actor.team)
        self._count(self.refusals, (event.address, action, actor, code), self._with_route(event, scope))

    def record_denial(self, scope: Scope, answer: bytes) -> None:
        """Record an answer 403, unless its request is recorded already: the first of a source at once, the others as a sum for each minute.

        A source is an address, a key or person, an error, a method and the first part of the path.
        """
        if REFUSAL_RECORDED in scope or AUDIT_ENTRY in scope or not scope["path"].startswith(API):
            return
        actor = self._actor_behind(scope)
        code = _error_code(answer)
        event = self._event(ACCESS_DENIED, scope, actor, 403, code, target=actor.key, target_team=actor.team)
        source = (event.address, actor, code, scope["method"], scope["path"].split("/", 3)[2])
        self._count(self.denials, source, self._with_route(event, scope))

    def _actor_behind(self, scope: Scope) -> Actor:
        """Return the actor of a request that was authenticated."""
        principal = scope.get(SESSION)
        if isinstance(principal, Principal):
            return actor_of(principal)
        caller: Caller | None = scope.get(CALLER_INFO)
        if caller is None or not caller.owner:
            return NOBODY
        kind = ActorKind.API_KEY if caller.key_id else ActorKind.BOOTSTRAP_KEY
        return Actor(kind, caller.owner, caller.key_id, self._person_of(caller.key_id))

    def _with_route(self, event: AuditEvent, scope: Scope) -> AuditEvent:
        route = safe_text(f"{scope.get('method', '')} {scope.get('path', '')}".strip(), self._secret)
        return event.model_copy(update={"details": encode_object({"route": route})})

    def open(self, action: str, scope: Scope, *, reads: bool, target: str = "") -> AuditEntry:
        """Begin the entry of an administrative request, and leave it in the request's scope."""
        entry = scope[AUDIT_ENTRY] = AuditEntry(self, action, scope, reads=reads, target=target)
        return entry

    def begin_entry(self, entry: AuditEntry) -> str:
        """Record that a change begins, without a result, and return the event's id."""
        event = self._event_of(entry, 0, "")
        self._write(event)
        return event.id

    def end_entry(self, entry: AuditEntry, status: int, error: str) -> None:
        """Record how an action ended. Readings, which consoles repeat, and refused attempts are counted, as refused keys are."""
        event = self._event_of(entry, status, error)
        if entry.is_allowed and not entry.reads:
            self._write(event)
            return
        target = entry.target if entry.is_allowed else ""
        self._count(self.readings, (event.address, entry.action, entry.actor, status, error, target), event)

    def _event_of(self, entry: AuditEntry, status: int, error: str) -> AuditEvent:
        event = self._event(
            entry.action, entry.scope, entry.actor, status, error, target=entry.target, target_team=entry.target_team
        )
        update: dict[str, Any] = {"changes": encode_object(entry.changes), "details": encode_object(entry.details)}
        if entry.id:
            update |= {"id": entry.id, "at_ms": _time_of(entry.id)}
        return event.model_copy(update=update)

    def _event(
        self,
        action: str,
        scope: Mapping[str, Any],
        actor: Actor,
        status: int,
        error: str,
        *,
        target: str,
        target_team: str,
    ) -> AuditEvent:
        new = new_id(ID_PREFIX)
        caller: Caller | None = scope.get(CALLER_INFO)
        return AuditEvent.model_construct(
            id=new,
            at_ms=_time_of(new),
            actor=actor.kind.value,
            team=actor.team,
            key=actor.key,
            person=actor.person,
            action=action,
            target_type=target_type_of(action),
            target=safe_text(target, self._secret),
            target_team=safe_text(target_team, self._secret),
            address=caller.address if caller is not None else "",
            request_id=scope.get(REQUEST_ID, ""),
            status=status,
            error=error,
        )

    def _count(self, sums: Summaries[AuditEvent], source: Hashable, event: AuditEvent) -> None:
        others = {"actor": NOBODY.kind.value, "details": encode_object({"sources": "others"})}
        others |= dict.fromkeys(
            ("team", "key", "person", "target", "target_team", "address", "request_id", "changes"), ""
        )
        sums.add(source, event, (event.action, event.status, event.error), lambda: event.model_copy(update=others))

    def _write(self, event: AuditEvent) -> None:
        self._emit(values_of(event))

    def _write_sum(self, event: AuditEvent, count: int) -> None:
        new = new_id(ID_PREFIX)
        self._write(event.model_copy(update={"id": new, "at_ms": _time_of(new), "count": count}))

    async def _write_sums(self) -> None:
        while True:
            await asyncio.sleep(SUMMARY_INTERVAL_S)
            self.refusals.write_due()
            self.denials.write_due()
            self.readings.write_due()


def _error_code(answer: bytes) -> str:
    """Return the code of the error object of OpenAI's or Anthropic's form, or its type where it has no code."""
    try:
        error = orjson.loads(answer)["error"]
        return str(error.get("code") or error["type"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""


def _time_of(event_id: str) -> int:
    """Return the Unix milliseconds at which the id was made."""
    return int(event_id[len(ID_PREFIX) : len(ID_PREFIX) + 12], 16)
