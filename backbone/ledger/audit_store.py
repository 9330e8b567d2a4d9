"""The audit log in the ledger's database: stores each event once, and reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from backbone.ledger.audit_query import AuditQuery, StoredAuditEvent
from backbone.ledger.database import LedgerDatabase
from schemas.audit import AuditEvent

if TYPE_CHECKING:
    from sqlalchemy import Connection


class AuditStore:
    """Stores and reads audit events. SQLAlchemy is imported by the first call, as in `UsageLedger`, which closes the database."""

    def __init__(self, database: LedgerDatabase) -> None:
        self._database = database

    async def store(self, events: Iterable[AuditEvent]) -> int:
        """Store the events whose id is not stored yet, and the results of those that had none. Return the number of new events.

        `events` is read in the database's thread. Raises Unavailable: repeat the call then.
        """

        def work(connection: Connection) -> int:
            from backbone.ledger.audit_statements import store

            return store(connection, events)

        return await self._database.write(work)

    async def page(self, query: AuditQuery, *, after: str, limit: int) -> list[StoredAuditEvent]:
        """Return at most `limit` events, newest first, behind the one with the id `after`; empty: from the newest. Raises Unavailable."""

        def work(connection: Connection) -> list[StoredAuditEvent]:
            from backbone.ledger.audit_statements import newest_first

            return newest_first(connection, query, after, limit)

        return await self._database.read(work)

    async def export(self, query: AuditQuery, *, after: int, limit: int) -> list[StoredAuditEvent]:
        """Return at most `limit` events in the order of their sequence, behind the sequence `after`. Raises Unavailable."""

        def work(connection: Connection) -> list[StoredAuditEvent]:
            from backbone.ledger.audit_statements import in_sequence

            return in_sequence(connection, query, after, limit)

        return await self._database.read(work)

    async def delete(self, before_ms: int, limit: int) -> int:
        """Delete at most `limit` events before `before_ms`, never the last, and return their number. Raises Unavailable."""

        def work(connection: Connection) -> int:
            from backbone.ledger.audit_statements import delete_old

            return delete_old(connection, before_ms, limit)

        return await self._database.write(work)
