"""The statements of the audit log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, func, insert, not_, or_, select

from backbone.ledger.audit_query import AuditQuery, StoredAuditEvent
from backbone.ledger.statements import MAX_KEYS, lock_writes
from backbone.ledger.tables import audit_events
from schemas.audit import REFUSED_STATUSES, AuditEvent, AuditResult

_columns = audit_events.c
_CONDITIONS = {
    AuditResult.UNKNOWN: _columns.status == 0,
    AuditResult.REFUSED: _columns.status.in_(REFUSED_STATUSES),
    AuditResult.SUCCESS: and_(_columns.status > 0, _columns.status < 400),
    AuditResult.FAILED: and_(_columns.status >= 400, not_(_columns.status.in_(REFUSED_STATUSES))),
}


def store(connection: Connection, events: Iterable[AuditEvent]) -> int:
    """Store the events that are not stored yet, and the results of those that had none. Return the number of new events."""
    lock_writes(connection)
    wanted = _merged(events)
    stored = _statuses(connection, list(wanted))
    ended = [one for one, status in stored.items() if status == 0 and wanted[one].status]
    for first in range(0, len(ended), MAX_KEYS):
        connection.execute(delete(audit_events).where(_columns.id.in_(ended[first : first + MAX_KEYS])))
    rows = [wanted[one].__dict__ for one in sorted(wanted) if one not in stored or one in ended]
    if rows:
        last = connection.execute(select(func.coalesce(func.max(_columns.sequence), 0))).scalar_one()
        connection.execute(
            insert(audit_events), [row | {"sequence": last + number} for number, row in enumerate(rows, 1)]
        )
    return len(wanted) - len(stored)


def _merged(events: Iterable[AuditEvent]) -> dict[str, AuditEvent]:
    """Return one event for each id: the one that has a result, if there is one."""
    found: dict[str, AuditEvent] = {}
    for event in events:
        known = found.get(event.id)
        if known is None or not known.status:
            found[event.id] = event
    return found


def _statuses(connection: Connection, ids: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for first in range(0, len(ids), MAX_KEYS):
        chosen = select(_columns.id, _columns.status).where(_columns.id.in_(ids[first : first + MAX_KEYS]))
        found.update((one, status) for one, status in connection.execute(chosen))
    return found


def newest_first(connection: Connection, query: AuditQuery, after: str, limit: int) -> list[StoredAuditEvent]:
    """Return at most `limit` events, behind the one with the id `after`."""
    statement = _chosen(query).order_by(_columns.id.desc()).limit(limit)
    if after:
        statement = statement.where(_columns.id < after)
    return _read(connection, statement)


def in_sequence(connection: Connection, query: AuditQuery, after: int, limit: int) -> list[StoredAuditEvent]:
    """Return at most `limit` events in the order of their sequence, behind `after`."""
    statement = _chosen(query).where(_columns.sequence > after).order_by(_columns.sequence).limit(limit)
    return _read(connection, statement)


def delete_old(connection: Connection, before_ms: int, limit: int) -> int:
    """Delete at most `limit` events before `before_ms`, but never the last: the next sequence continues from it."""
    last = select(func.max(_columns.sequence)).scalar_subquery()
    old = select(_columns.id).where(_columns.id < _first_id(before_ms), _columns.sequence < last).limit(limit)
    return connection.execute(delete(audit_events).where(_columns.id.in_(old))).rowcount


def _first_id(at_ms: int) -> str:
    """Return the smallest id of events of this time."""
    return f"aud_{at_ms:012x}"


def _chosen(query: AuditQuery) -> Select[Any]:
    conditions = [_columns.id >= _first_id(query.start_ms), _columns.id < _first_id(query.end_ms)]
    conditions += [_columns[name].in_(values) for name, values in query.filters.items()]
    if query.actions:
        exact = [action for action in query.actions if not action.endswith("*")]
        prefixes = [action.removesuffix("*") for action in query.actions if action.endswith("*")]
        begin = (_columns.action.startswith(prefix, autoescape=True) for prefix in prefixes)
        conditions.append(or_(_columns.action.in_(exact), *begin))
    if query.results:
        conditions.append(or_(*(_CONDITIONS[result] for result in query.results)))
    return select(audit_events).where(*conditions)


def _read(connection: Connection, statement: Select[Any]) -> list[StoredAuditEvent]:
    found = []
    for row in connection.execute(statement).mappings():
        fields = dict(row)
        found.append(StoredAuditEvent(fields.pop("sequence"), AuditEvent.model_construct(**fields)))
    return found
