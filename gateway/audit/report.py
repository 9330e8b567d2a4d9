"""Answer `GET /v1/audit` and its export."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson

from backbone.ledger.audit_query import AuditQuery, StoredAuditEvent
from backbone.ledger.audit_store import AuditStore
from gateway.audit.query import AuditPageRequest
from gateway.usage.report import NoLedger
from schemas.audit import result_of

EXPORT_PAGE = 200
"""Events of an export that are in memory at the same time."""


class AuditReports:
    """Reads the audit log for operators."""

    def __init__(self, store: AuditStore | None) -> None:
        self._store = store

    async def page(self, wanted: AuditPageRequest) -> dict[str, Any]:
        """Return a page as OpenAI's list object, newest first. Raises NoLedger, Unavailable."""
        found = await self.require_store().page(wanted.query, after=wanted.after, limit=wanted.limit + 1)
        data = [event_object(one) for one in found[: wanted.limit]]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > wanted.limit,
        }

    async def export(self, query: AuditQuery, after: int) -> AsyncGenerator[bytes, None]:
        """Yield all events behind the sequence `after` as JSON lines, those of one read together. Raises NoLedger, Unavailable."""
        store = self.require_store()
        while found := await store.export(query, after=after, limit=EXPORT_PAGE):
            after = found[-1].sequence
            yield b"".join(orjson.dumps(event_object(one)) + b"\n" for one in found)

    def require_store(self) -> AuditStore:
        """Return the store. Raises NoLedger, which routes say before they look at a query."""
        if self._store is None:
            raise NoLedger
        return self._store


def event_object(stored: StoredAuditEvent) -> dict[str, Any]:
    """Return the API's object for an event."""
    event = stored.event
    return {
        "id": event.id,
        "object": "audit_event",
        "sequence": stored.sequence,
        "created_at": event.at_ms / 1000,
        "actor": {
            "type": event.actor,
            "team": event.team or None,
            "key": event.key or None,
            "person": event.person or None,
        },
        "action": event.action,
        "target": {"type": event.target_type, "id": event.target or None, "team": event.target_team or None},
        "address": event.address or None,
        "request_id": event.request_id or None,
        "result": result_of(event.status),
        "status": event.status or None,
        "error": event.error or None,
        "count": event.count,
        "changes": orjson.loads(event.changes or b"{}"),
        "details": orjson.loads(event.details or b"{}"),
    }
